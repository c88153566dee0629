"""Generation: jaxsft beside transformers.generate, the same shape and the same prompts in the same run.

    pip install -e ".[parity]" && python benchmarks/generate.py
    python benchmarks/generate.py --batches 8 --turns 5

The Qwen 3 shape of benchmarks/step.py (41.6 M parameters, vocabulary 32,000) with random weights in float32; prompts
of 8 to 48 tokens, 64 new ones each, drawn at temperature 1, no stop token. transformers pads on the left, which is
its way. Each side runs in a process of its own, so that the peak memory is its own; the sides take turns. The first
call compiles or warms up and does not count; the median of the others does. "core s" is processor time a call.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

from step import SHAPE

LONGEST, SHORTEST, NEW = 48, 8, 64


def prompts_of(batch: int) -> list[list[int]]:
    import numpy as np

    draw = np.random.default_rng(0)
    sizes = [LONGEST, *draw.integers(SHORTEST, LONGEST + 1, batch - 1)]
    return [draw.integers(0, SHAPE["vocab_size"], size).tolist() for size in sizes]


def timed(call, calls: int) -> list[tuple[float, float]]:
    """Seconds of the wall and of all cores of each call but the first."""
    found = []
    for number in range(calls + 1):
        wall, cores = time.perf_counter(), time.process_time()
        call(number)
        found.append((time.perf_counter() - wall, time.process_time() - cores))
    return found[1:]


def jaxsft_calls(batch: int, calls: int) -> list[tuple[float, float]]:
    import jax

    from jaxsft import models, sample

    model = models.build(models.FAMILIES["qwen3"].read_config(SHAPE))
    variables, prompts = {"params": jax.jit(model.init)(jax.random.key(0))}, prompts_of(batch)
    how = {"max_new_tokens": NEW, "draw": sample.Draw(temperature=1.0)}

    def call(number: int) -> None:
        found = sample.generate(model, variables, prompts, **how, key=jax.random.key(number))
        assert found.lengths.tolist() == [NEW] * batch

    return timed(call, calls)


def transformers_calls(batch: int, calls: int) -> list[tuple[float, float]]:
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**{k: v for k, v in SHAPE.items() if k != "model_type"})).eval()
    prompts = prompts_of(batch)
    padded = torch.tensor([[0] * (LONGEST - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (LONGEST - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    how = {"do_sample": True, "temperature": 1.0, "top_k": 0, "max_new_tokens": NEW, "pad_token_id": 0}

    def call(number: int) -> None:
        with torch.no_grad():
            out = model.generate(padded, attention_mask=mask, eos_token_id=None, **how)
        assert out.shape == (batch, LONGEST + NEW)

    return timed(call, calls)


SIDES = {"jaxsft": jaxsft_calls, "transformers": transformers_calls}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8, 64], help="prompts answered at one time")
    parser.add_argument("--calls", type=int, default=3, help="timed calls a turn")
    parser.add_argument("--turns", type=int, default=2, help="turns of each side")
    parser.add_argument("--side", nargs=2, metavar=("SIDE", "BATCH"), help="run one side in this process; print JSON")
    args = parser.parse_args()
    if args.side:
        side, batch = args.side
        times = SIDES[side](int(batch), args.calls)
        print(json.dumps({"times": times, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}))
        return
    print(f"{'batch':>5}  {'side':14} {'tokens/s':>9} {'median s':>9} {'core s':>7} {'peak GB':>8}")
    for batch in args.batches:
        found = {side: [] for side in SIDES}
        for _ in range(args.turns):
            for side in SIDES:
                command = [sys.executable, __file__, "--calls", str(args.calls), "--side", side, str(batch)]
                out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
                found[side].append(json.loads(out.splitlines()[-1]))
        for side, turns in found.items():
            wall, cores = (
                statistics.median(x) for x in zip(*(t for turn in turns for t in turn["times"]), strict=True)
            )
            most = max(turn["peak"] for turn in turns) / 1e6
            print(f"{batch:5}  {side:14} {batch * NEW / wall:9.1f} {wall:9.3f} {cores:7.2f} {most:8.2f}", flush=True)


if __name__ == "__main__":
    main()
