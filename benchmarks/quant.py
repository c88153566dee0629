"""What packing the kernels of a frozen base costs and saves: none, int8 and nf4 in turns.

    python benchmarks/quant.py
    python benchmarks/quant.py --model MODEL --text HELD_OUT.jsonl

Perplexity: of the model (by default the one that ships) on text it was not trained on, rows {"text": ...}. Step: one
LoRA step of the shape in benchmarks/step.py, 41.6 M parameters in float32, 4 x 512 tokens, with model.remat block; its
peak is what the compiler plans for arguments and temporaries. Load: a checkpoint of a Qwen 3 0.6B's shape, 596 M random
weights in bfloat16, in files of 0.2 GB; its peak is what the process grew by at most, the compilation of the packing
included. Each kind runs in a process of its own; the kinds take turns, and the median of the steps counts. On two quiet
CPU cores:

                    step, 41.6 M in float32       load, 596 M in bfloat16
       perplexity weights MB  peak MB tokens/s  weights MB  peak MB seconds
none      495.044      166.2      454      579      1192.1     1707     3.8
int8      495.060       90.9      378      623       753.1     1442     2.8
nf4       501.033       78.6      366      626       538.5     1213     3.6
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from step import LENGTH, RANK, ROWS, SHAPE

ROOT = Path(__file__).parents[1]
KINDS = ("none", "int8", "nf4")
LARGE = {
    "model_type": "qwen3",
    "vocab_size": 151_936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}


def write_checkpoint(folder: Path, shape: dict) -> None:
    """Writes random weights of a shape, a tensor in memory at a time."""
    import jax.numpy as jnp
    import numpy as np

    from jaxsft import hub, tree
    from jaxsft.hub import files, names

    (folder / "config.json").write_text(json.dumps(shape))
    family, config = hub.read_config(folder)
    draw, dtype, tensors = np.random.default_rng(0), jnp.dtype(shape.get("torch_dtype", "float32")), []
    for path, leaf in tree.flat(hub.shapes(config)).items():
        here, transposed = names.leaf_names(family, path, leaf.shape)
        size = leaf.shape[here.ndim :]
        size = size[::-1] if transposed else size
        make = lambda size=size: (0.02 * draw.standard_normal(size, np.float32)).astype(dtype)
        tensors += [files.Tensor(name, size, dtype, make) for name in here.flat]
    files.write(folder, tensors, shard_gb=0.2)


def peak() -> int:
    """The most bytes that this process has had in memory."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def size(variables) -> int:
    import jax

    return sum(x.nbytes for x in jax.tree.leaves(variables))


def load(folder: str, kind: str) -> dict[str, float]:
    import jax

    from jaxsft import hub

    jax.block_until_ready(jax.numpy.zeros(1))
    before, start = peak(), time.perf_counter()
    _, variables = hub.load_variables(folder, quantise=kind, dtype="bfloat16")
    jax.block_until_ready(variables)
    return {"load_s": time.perf_counter() - start, "load_peak": peak() - before, "load_size": size(variables)}


def perplexity(model_path: str, text: str, kind: str) -> dict[str, float]:
    from jaxsft import data, hub, objectives, sharding, train

    model, variables = hub.load_variables(model_path, quantise=kind)
    mesh = sharding.mesh(data=1)
    rows, _, _ = data.load(data.Config(train=text, format="text", max_length=512), hub.load_tokenizer(model_path))
    batches = train.place(data.batches(rows, 8, seed=None, epochs=1), mesh)
    measured = train.make_evaluation(objectives.supervised(model))({}, variables, batches)
    return {"perplexity": math.exp(measured["loss"])}


def steps(folder: str, kind: str, count: int) -> dict:
    import jax
    import jax.numpy as jnp

    import jaxsft
    from jaxsft import hub, lora, optim, train

    model, base = hub.load_variables(folder, quantise=kind, remat="block")
    adapter = lora.init(jax.random.key(1), hub.shapes(model.config), jaxsft.LoRA(rank=RANK))
    trainable, frozen = jaxsft.tree.partition(base | {"lora": adapter}, lora.TRAINABLE)
    tx, _ = optim.build(optim.Config(), count)
    state = train.init(trainable, tx, jax.random.key(2))
    tokens = jax.random.randint(jax.random.key(3), (ROWS, LENGTH), 0, SHAPE["vocab_size"])
    ones = jnp.ones_like(tokens)
    batch = jaxsft.Tokens(tokens, ones > 0, jnp.broadcast_to(jnp.arange(LENGTH), tokens.shape), ones)
    step = train.make_step(jaxsft.supervised(model), tx).lower(state, frozen, batch).compile()
    plan, times = step.memory_analysis(), []
    for _ in range(count + 1):
        start = time.perf_counter()
        state, metrics = step(state, frozen, batch)
        jax.block_until_ready(metrics)
        times.append(time.perf_counter() - start)
    planned = plan.argument_size_in_bytes + plan.temp_size_in_bytes
    return {"times": times[1:], "step_peak": planned, "step_size": size(base)}


def main() -> None:
    import jaxsft

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=jaxsft.BASE, help="whose perplexity to measure")
    parser.add_argument("--text", default=str(ROOT / "jaxsft/assets/text/notes.jsonl"), help="on what")
    parser.add_argument("--steps", type=int, default=5, help="timed steps a turn")
    parser.add_argument("--turns", type=int, default=2, help="turns of each kind")
    parser.add_argument("--side", nargs=3, metavar=("KIND", "LARGE", "SMALL"), help="run one kind; print JSON")
    args = parser.parse_args()
    if args.side:
        kind, large, small = args.side
        figures = load(large, kind) | perplexity(args.model, args.text, kind) | steps(small, kind, args.steps)
        print(json.dumps(figures))
        return
    found = {kind: [] for kind in KINDS}
    with tempfile.TemporaryDirectory() as folder:
        shapes = {"large": LARGE, "small": SHAPE}
        for name, shape in shapes.items():
            (Path(folder) / name).mkdir()
            write_checkpoint(Path(folder) / name, shape)
        for _ in range(args.turns):
            for kind in KINDS:
                command = [sys.executable, __file__, "--model", args.model, "--text", args.text]
                command += ["--steps", str(args.steps), "--side", kind, *(f"{folder}/{name}" for name in shapes)]
                out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
                found[kind].append(json.loads(out.splitlines()[-1]))
    print(f"{'':6} {'':>10} {'step, 41.6 M in float32':^28} {'load, 596 M in bfloat16':^28}")
    print(f"{'':6} {'perplexity':>10} {'weights MB':>10} {'peak MB':>8} {'tokens/s':>8}", end="")
    print(f" {'weights MB':>10} {'peak MB':>9} {'seconds':>7}")
    for kind, turns in found.items():
        first, speed = turns[0], ROWS * LENGTH / statistics.median(t for turn in turns for t in turn["times"])
        print(f"{kind:6} {first['perplexity']:10.3f}", end="")
        print(f" {first['step_size'] / 1e6:10.1f} {first['step_peak'] / 1e6:8.0f} {speed:8.0f}", end="")
        most, least = max(turn["load_peak"] for turn in turns), min(turn["load_s"] for turn in turns)
        print(f" {first['load_size'] / 1e6:10.1f} {most / 1e6:9.0f} {least:7.1f}")


if __name__ == "__main__":
    main()
