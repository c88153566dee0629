"""One LoRA step on a CPU or GPU: jaxsft beside transformers + PEFT, the same work in the same run.

    pip install -e ".[parity]" && python benchmarks/step.py
    python benchmarks/step.py --adapter dora

A Qwen 3 shape of 41.6 M parameters (512 wide, 8 layers, 8/4 heads of 64, MLP 1536, vocabulary 32,000, tied), rank 16 on
every linear layer, 4 rows of 512 tokens, every token learned, AdamW, gradient clipping. Each side runs in a process of
its own, so that the peak memory is its own; the sides take turns, and the median of the steps counts.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

ROWS, LENGTH, RANK = 4, 512, 16
# Here, and in PEFT.
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS = {
    "lora": ({}, {}),
    "dora": ({"dora": True}, {"use_dora": True}),
    "pissa": ({"init": "pissa"}, {"init_lora_weights": "pissa"}),
    "embed": ({"targets": "embed|blocks/.*"}, {"target_modules": [*LINEAR, "embed_tokens"]}),
    "head": ({"targets": "head|blocks/.*"}, {"target_modules": [*LINEAR, "lm_head"]}),
}
SHAPE = {
    "model_type": "qwen3",
    "vocab_size": 32_000,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "tie_word_embeddings": True,
}


def jaxsft_steps(steps: int, dtype: str, kind: str) -> list[float]:
    import jax
    import jax.numpy as jnp

    import jaxsft
    from jaxsft import lora, models, optim, train

    model = models.build(models.FAMILIES["qwen3"].read_config(SHAPE), dtype=jnp.dtype(dtype))
    params = jax.tree.map(lambda x: x.astype(dtype), jax.jit(model.init)(jax.random.key(0)))
    adapter = lora.init(jax.random.key(1), params, jaxsft.LoRA(rank=RANK, **ADAPTERS[kind][0]))
    trainable, frozen = jaxsft.tree.partition({"params": params, "lora": adapter}, lora.TRAINABLE)
    tx, _ = optim.build(optim.Config(), steps)
    step = train.make_step(jaxsft.supervised(model), tx)
    state = train.init(trainable, tx, jax.random.key(2))
    tokens = jax.random.randint(jax.random.key(3), (ROWS, LENGTH), 0, SHAPE["vocab_size"])
    ones = jnp.ones_like(tokens)
    batch = jaxsft.Tokens(tokens, ones > 0, jnp.broadcast_to(jnp.arange(LENGTH), tokens.shape), ones)
    times = []
    for _ in range(steps + 1):
        start = time.perf_counter()
        state, metrics = step(state, frozen, batch)
        jax.block_until_ready(metrics)
        times.append(time.perf_counter() - start)
    return times[1:]


def peft_steps(steps: int, dtype: str, kind: str) -> list[float]:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = Qwen3Config(**{k: v for k, v in SHAPE.items() if k != "model_type"}, use_cache=False)
    model = Qwen3ForCausalLM(config).to(device, getattr(torch, dtype))
    model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=32, **{"target_modules": LINEAR, **ADAPTERS[kind][1]}))
    model.train()
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=2e-4, weight_decay=0.0)
    tokens = torch.randint(0, SHAPE["vocab_size"], (ROWS, LENGTH), device=device)
    times = []
    for _ in range(steps + 1):
        start = time.perf_counter()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        times.append(time.perf_counter() - start)
    return times[1:]


SIDES = {"jaxsft": jaxsft_steps, "transformers + PEFT": peft_steps}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10, help="timed steps a turn")
    parser.add_argument("--turns", type=int, default=2, help="turns of each side")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--side", choices=SIDES, help="run one side in this process and print its times as JSON")
    parser.add_argument("--adapter", choices=ADAPTERS, default="lora")
    args = parser.parse_args()
    if args.side:
        times = SIDES[args.side](args.steps, args.dtype, args.adapter)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(json.dumps({"times": times, "peak": peak}))
        return
    found = {side: [] for side in SIDES}
    for _ in range(args.turns):
        for side in SIDES:
            command = [sys.executable, __file__, "--side", side, "--steps", str(args.steps), "--dtype", args.dtype]
            command += ["--adapter", args.adapter]
            out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found[side].append(json.loads(out.splitlines()[-1]))
    print(
        f"{'side':22} {'median s':>9} {'tokens/s':>9} {'fastest':>9} {'peak GB':>8}   {args.dtype}, {ROWS} x {LENGTH}"
    )
    for side, turns in found.items():
        times = [t for turn in turns for t in turn["times"]]
        median, peak = statistics.median(times), max(turn["peak"] for turn in turns) / 1e6
        print(f"{side:22} {median:9.3f} {ROWS * LENGTH / median:9.0f} {ROWS * LENGTH / min(times):9.0f} {peak:8.2f}")


if __name__ == "__main__":
    main()
