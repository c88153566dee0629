"""Merge: fold what a run trained into its base, shard by shard, in float32 cast once.

    python scripts/merge.py --base BASE --adapter RUN/adapter --out MERGED
    python scripts/merge.py --base BASE --adapter '[RUN/adapter, OTHER/adapter]' --weights '[0.7, 0.3]' --out MERGED
    python scripts/merge.py --checkpoint RUN/checkpoints/STEP --out MERGED

The first form takes a PEFT adapter folder, ours or PEFT's; the second the weighted sum of several; the third any step
of a run, whose base it knows.
"""

from dataclasses import dataclass, field
from pathlib import Path

from jaxsft import checkpoint, config, data, hub, lora, report, results, run, tuning


@dataclass(frozen=True)
class Config:
    """What to merge into what."""

    base: str = ""
    """the checkpoint that was fine-tuned, folder or hub name; with checkpoint, the one it was trained on by default"""
    adapter: list[str] | str = ""
    """an adapter folder in PEFT's format, or a list of them"""
    weights: list[float] = field(default_factory=list)
    """of several adapters: the change of the weights is the sum of theirs, each times its weight"""
    checkpoint: str = ""
    """a step of a run: RUN/checkpoints/STEP"""
    out: str = "runs/merged"
    """the folder to write"""
    shard_gb: float = 5.0
    """the largest weight file, in 10^9 bytes"""


def of_folders(cfg: Config) -> tuple[dict, dict]:
    """The adapter that was asked for, or the weighted sum of several, and the weights that go with it."""
    folders = [cfg.adapter] if isinstance(cfg.adapter, str) else cfg.adapter
    family, shape = hub.read_config(hub.resolve(cfg.base))
    found = [hub.load_adapter(folder, hub.on_disk(cfg.base), family=family, config=shape) for folder in folders]
    if len(found) == 1 and not cfg.weights:
        return found[0].lora, found[0].params
    if len(found) != len(cfg.weights):
        raise run.RunError(f"there are {len(found)} adapters and {len(cfg.weights)} weights; give a weight for each")
    if whole := [folder for folder, one in zip(folders, found, strict=True) if one.params]:
        raise run.RunError(f"{whole[0]} holds whole weights (modules_to_save), which do not add up; merge it alone")
    return lora.weighted([(one.lora, weight) for one, weight in zip(found, cfg.weights, strict=True)]), {}


def of_checkpoint(leaves: dict, base: str, saved: dict) -> tuple[dict | None, dict]:
    """The adapter of a step, if it has one, and the weights that trained."""
    if "lora" not in leaves:
        return None, leaves["params"]
    fields = {key.removeprefix("tuning.lora."): v for key, v in saved.items() if key.startswith("tuning.lora.")}
    if saved["tuning.lora.init"] != "lora" and saved.get("model.quantise", "none") != "none":
        raise run.RunError(
            "what PiSSA and OLoRA started at over a packed base is not in the checkpoint; resume the run, and take the "
            "merged model that it exports at its end"
        )
    depth = hub.read_config(hub.resolve(base))[1].layers
    cut = tuning.plan(tuning.Config(layers=saved["tuning.layers"]), depth).cut
    params = hub.on_disk(base, dtype=saved["model.dtype"], cut=cut)
    return lora.complete(leaves["lora"], params, lora.LoRA(**fields)), leaves.get("params", {})


def main(cfg: Config) -> None:
    if bool(cfg.adapter) == bool(cfg.checkpoint):
        raise run.RunError("give either adapter (a PEFT folder) or checkpoint (RUN/checkpoints/STEP)")
    if cfg.weights and cfg.checkpoint:
        raise run.RunError("weights are those of several adapters; a checkpoint has none")
    base, template, quantise = cfg.base, "", "none"
    if cfg.checkpoint:
        step = Path(cfg.checkpoint)
        leaves, saved = checkpoint.read_trained(step), checkpoint.read_config(step)
        if saved.get("init") == "random":
            raise run.RunError(f"{step} was trained from random weights and has no base; its run exports it")
        base, template = base or saved["model.path"], saved.get("data.template", "")
        quantise = saved.get("model.quantise", "none")
        adapter, trained = of_checkpoint(leaves, base, saved)
        tokens, special = (saved.get(f"model.{key}", []) for key in ("new_tokens", "new_special_tokens"))
        tokenizer, _ = hub.load_vocabulary(base, tokens, special=special)
    else:
        adapter, trained = of_folders(cfg)
        first = cfg.adapter if isinstance(cfg.adapter, str) else cfg.adapter[0]
        tokenizer, template = hub.adapter_tokenizer(first, base), hub.adapter_template(first)
    files = hub.merge(base, cfg.out, adapter=adapter, trained=trained, shard_gb=cfg.shard_gb)
    hub.save_tokens(Path(cfg.out), tokenizer, base)
    if hub.read_config(hub.resolve(base))[0].task:  # nobody asks an encoder
        hub.save_template(Path(cfg.out), data.with_template(tokenizer, template))
    written = {"written to": cfg.out, "files": len(files), "size": report.size(Path(cfg.out))}
    report.summary("merged", results.merged_into(base, quantise) | written)


if __name__ == "__main__":
    run.guard(lambda: main(config.parse(Config)))
