"""What a LoRA step of an 8-billion-parameter shape needs of each of 1, 8 and 256 devices: pre-flight, no weights.

    python benchmarks/plan.py

The shape is that of Llama 3.1 8B: bfloat16, remat block, rank 16 on every linear layer, 4,096 tokens a row, one row a
device; the base in bfloat16 and as NF4. CPU devices stand for the run's own. Each mesh needs a process of its own,
since jax makes its devices once; compiling takes about a minute each on two cores.
"""

import json
import sys
import tempfile
from multiprocessing import get_context
from pathlib import Path

from jaxsft import hub, objectives, optim, preflight, report, sharding, train, tuning

SHAPE = {
    "model_type": "llama",
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
}
MESHES = {"1 device": (1, 1, 1), "8 devices": (1, 8, 1), "256 devices": (8, 32, 1)}  # data, fsdp, tensor
LENGTH = 4096


def plan(mesh: tuple[int, int, int], quantise: str) -> preflight.Need:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(SHAPE))
        data, fsdp, tensor = mesh
        sections = preflight.Sections(
            hub.Config(folder, "bfloat16", "block", quantise),  # type: ignore[arg-type]
            tuning.Config(lora=tuning.LoRA(rank=16)),
            optim.Config(),
            train.Config(batch_size=data * fsdp),
            sharding.Config(data, fsdp, tensor),
            LENGTH,
        )
        preflight.pretend(sections.mesh)
        return preflight.measure(preflight.over_tokens(objectives.supervised), sections)


def main() -> None:
    rows, gb = [], lambda n: f"{n / 1e9:.2f}"
    for name, mesh in MESHES.items():
        for quantise in ("none", "nf4"):
            with get_context("spawn").Pool(1) as pool:
                need = pool.apply(plan, (mesh, quantise))
            found = (need.weights, need.optimizer, need.working, need.logits, need.total)
            rows.append((name, " x ".join(map(str, mesh)), quantise, *map(gb, found)))
            print(*rows[-1], file=sys.stderr, flush=True)
    heads = ("devices", "data x fsdp x tensor", "base", "weights", "optimizer", "working", "logits of it", "in all")
    report.table(f"GB on each device, {need.parameters:,} parameters of which {need.trained:,} train", heads, rows)


if __name__ == "__main__":
    main()
