"""Merge: fold what a run trained into its base, shard by shard, in float32 cast once.

    python scripts/merge.py --base BASE --adapter RUN/adapter --out MERGED
    python scripts/merge.py --checkpoint RUN/checkpoints/STEP --out MERGED

The first form takes a PEFT adapter folder, ours or PEFT's; the second any step of a run, whose base it knows.
"""

from dataclasses import dataclass
from pathlib import Path

from jaxsft import checkpoint, config, data, hub, lora, report, results, run


@dataclass(frozen=True)
class Config:
    """What to merge into what."""

    base: str = ""
    """the checkpoint that was fine-tuned, folder or hub name; with checkpoint, the one it was trained on by default"""
    adapter: str = ""
    """an adapter folder in PEFT's format"""
    checkpoint: str = ""
    """a step of a run: RUN/checkpoints/STEP"""
    out: str = "runs/merged"
    """the folder to write"""
    shard_gb: float = 5.0
    """the largest weight file, in 10^9 bytes"""


def main(cfg: Config) -> None:
    if bool(cfg.adapter) == bool(cfg.checkpoint):
        raise run.RunError("give either adapter (a PEFT folder) or checkpoint (RUN/checkpoints/STEP)")
    adapter = trained = None
    template, quantise = "", "none"
    if cfg.checkpoint:
        step = Path(cfg.checkpoint)
        leaves, saved = checkpoint.read_trained(step), checkpoint.read_config(step)
        base = cfg.base or saved["model.path"]
        if saved.get("init") == "random":
            raise run.RunError(f"{step} was trained from random weights and has no base; its run exports it")
        if "lora" in leaves:
            fields = {key.removeprefix("tuning.lora."): v for key, v in saved.items() if key.startswith("tuning.lora.")}
            adapter = lora.with_scale(leaves["lora"], lora.LoRA(**fields))
        trained, template = leaves.get("params"), saved.get("data.template", "")
        quantise = saved.get("model.quantise", "none")
    else:
        base = cfg.base
        family, shape = hub.read_config(hub.resolve(base))
        template = hub.adapter_template(cfg.adapter)
        adapter, _ = hub.load_adapter(cfg.adapter, hub.shapes(shape), family=family, config=shape)
    files = hub.merge(base, cfg.out, adapter=adapter, trained=trained, shard_gb=cfg.shard_gb)
    if hub.read_config(hub.resolve(base))[0].task:  # nobody asks an encoder
        hub.save_template(Path(cfg.out), data.with_template(hub.load_tokenizer(base), template))
    written = {"written to": cfg.out, "files": len(files), "size": report.size(Path(cfg.out))}
    report.summary("merged", results.merged_into(base, quantise) | written)


if __name__ == "__main__":
    run.guard(lambda: main(config.parse(Config)))
