"""Generation: jaxsft beside transformers.generate, the same shape and the same prompts in the same run.

    pip install -e ".[parity]" && python benchmarks/generate.py
    python benchmarks/generate.py --batches 8 --turns 5

The Qwen 3 shape of benchmarks/step.py (41.6 M parameters, vocabulary 32,000) with random weights in float32; prompts
of 8 to 48 tokens, 64 new ones each, drawn at temperature 1, no stop token. transformers pads on the left, which is
its way.
"""

import itertools
import json

import harness
from step import SHAPE

LONGEST, SHORTEST, NEW = 48, 8, 64


def prompts_of(batch: int) -> list[list[int]]:
    import numpy as np

    draw = np.random.default_rng(0)
    sizes = [LONGEST, *draw.integers(SHORTEST, LONGEST + 1, batch - 1)]
    return [draw.integers(0, SHAPE["vocab_size"], size).tolist() for size in sizes]


def jaxsft_side(case: dict, calls: int) -> dict:
    import jax

    from jaxsft import models, sample

    batch, numbers = case["batch"], itertools.count()
    model = models.build(models.FAMILIES["qwen3"].read_config(SHAPE))
    variables, prompts = {"params": jax.jit(model.init)(jax.random.key(0))}, prompts_of(batch)
    how = {"max_new_tokens": NEW, "draw": sample.Draw(temperature=1.0)}

    def call() -> None:
        found = sample.generate(model, variables, prompts, **how, key=jax.random.key(next(numbers)))
        assert found.lengths.tolist() == [NEW] * batch

    return harness.timed(call, calls) | {"work": batch * NEW}


def transformers_side(case: dict, calls: int) -> dict:
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**{k: v for k, v in SHAPE.items() if k != "model_type"})).eval()
    batch = case["batch"]
    prompts = prompts_of(batch)
    padded = torch.tensor([[0] * (LONGEST - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (LONGEST - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    how = {"do_sample": True, "temperature": 1.0, "top_k": 0, "max_new_tokens": NEW, "pad_token_id": 0}

    def call() -> None:
        with torch.no_grad():
            out = model.generate(padded, attention_mask=mask, eos_token_id=None, **how)
        assert out.shape == (batch, LONGEST + NEW)

    return harness.timed(call, calls) | {"work": batch * NEW}


SIDES = {"jaxsft": jaxsft_side, "transformers": transformers_side}


def main() -> None:
    parser = harness.parser(__doc__, [*SIDES])
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8, 64], help="prompts answered at one time")
    args = parser.parse_args()
    if args.side:
        harness.finish(SIDES[args.side](json.loads(args.case), args.calls))
        return
    rows = []
    for batch in args.batches:
        rows += harness.turns(__file__, {"name": f"batch {batch}", "batch": batch}, args.sides, args)
    harness.show(rows, args.json)


if __name__ == "__main__":
    main()
