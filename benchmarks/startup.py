"""From the start of a process to the end of its first step, and what compiling takes as models grow deeper.

    pip install -e ".[parity]" && python benchmarks/startup.py

The work is that of benchmarks/step.py, LoRA in float32. "jaxsft" finds nothing compiled, "jaxsft, again" what the run
before it left in the cache that is on by default. Of 4 and 48 layers the figure is the compilation of the step alone,
the layers 64 wide: they are scanned, so the program is the same.
"""

import json
import os
import tempfile

import harness
import step

DEEP = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}


def first_step(case: dict, calls: int) -> dict:
    """Imports, weights, compilation and one step, as a script does them."""
    from jaxsft import cache

    cache.keep_programs()
    step.jaxsft_side({**case, "cached": True}, 0)
    return harness.since_start()


def peft_first_step(case: dict, calls: int) -> dict:
    step.peft_side(case, 0)
    return harness.since_start()


def compiled(case: dict, calls: int) -> dict:
    """The first call of a step less a later one."""
    found = step.jaxsft_side(case, 2)
    return {**found, "times": [found["first"] - min(found["times"])], "cores": [0.0], "first": 0.0, "work": 1}


def tunix_compiled(case: dict, calls: int) -> dict:
    found = step.tunix_side(case, 2)
    return {**found, "times": [found["first"] - min(found["times"])], "cores": [0.0], "first": 0.0, "work": 1}


START = {"jaxsft": first_step, "jaxsft, again": first_step, "transformers + PEFT": peft_first_step}
COMPILE = {"jaxsft": compiled, "tunix": tunix_compiled}


def main() -> None:
    parser = harness.parser(__doc__, [*START, "tunix"])
    parser.add_argument("--layers", nargs="*", type=int, default=[4, 48], help="whose compilation is timed")
    args = parser.parse_args()
    if args.side:
        case = json.loads(args.case)
        sides = COMPILE if "layers" in case["name"] else START
        harness.finish(sides[args.side](case, args.calls))
        return
    kept = [side for side in START if side in args.sides]
    with tempfile.TemporaryDirectory() as folder:
        rows = []
        for side in kept:  # one turn each: a second one of the first side would find what it left itself
            os.environ["JAXSFT_CACHE"] = folder
            args.turns = 1
            rows += harness.turns(__file__, {**step.SMALL, "name": "to the first step"}, [side], args, unit="s")
    for layers in args.layers:
        case = {**step.SMALL, "shape": {**step.SHAPE, **DEEP, "num_hidden_layers": layers, "vocab_size": 1024}}
        case |= {"rows": 2, "length": 128, "name": f"compilation, {layers} layers"}
        rows += harness.turns(__file__, case, [side for side in COMPILE if side in args.sides], args, unit="s")
    harness.show(rows, args.json)


if __name__ == "__main__":
    main()
