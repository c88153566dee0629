"""What a fine-tuning run leaves: the adapter, the merged checkpoint."""

import json
from collections.abc import Sequence
from pathlib import Path

import jax

from jaxsft import data, hub, report, tree
from jaxsft.hub import ExportConfig
from jaxsft.tuning import Learner


def save(
    folder: Path,
    base: str,
    learner: Learner,
    *,
    tokenizer,
    config: ExportConfig,
    quantise: str = "none",
) -> dict[str, Path]:
    """Writes adapter and merged checkpoint of what a run trained.

    Args:
      folder: takes `adapter/` and `merged/`.
      base: the checkpoint that was fine-tuned.
      learner: what was trained, with the constants of its adapter.
      tokenizer: the run's, whose chat template goes along where the base has none.
      config: which of the two to write, and how large a file may be.
      quantise: what the base was packed as while training; it is merged into as its files have it all the same.

    Returns:
      {"adapter": folder, "merged": folder}, those written.
    """
    written, (family, shape) = {}, hub.read_config(hub.resolve(base))
    _, plan, trained, frozen = learner
    adapter = tree.combine(trained["lora"], frozen["lora"]) if plan.lora else None
    params = trained.get("params", {})
    if adapter is not None and plan.lora and config.adapter:
        written["adapter"] = folder / "adapter"
        given = {"trained": params, "family": family, "base": base, "config": shape}
        hub.export_adapter(str(written["adapter"]), adapter, plan.lora, **given)
    if config.merged:
        written["merged"] = folder / "merged"
        hub.merge(base, str(written["merged"]), adapter=adapter, trained=params, shard_gb=config.shard_gb)
    for path in written.values():
        hub.save_tokens(path, tokenizer, base)
        if family.task:  # nobody asks an encoder
            hub.save_template(path, tokenizer)
    if config.merged and quantise != "none":
        report.summary("merged", merged_into(base, quantise))
    return written


def merged_into(base: str, quantise: str) -> dict[str, str]:
    """Says what a run's part was merged into.

    Example:
      >>> merged_into("org/name", "nf4")["into"]
      'org/name, its own files in full precision, not the nf4 copy'
    """
    if quantise == "none":
        return {"into": base}
    return {
        "into": f"{base}, its own files in full precision, not the {quantise} copy",
        "trained over": f"the {quantise} copy; answers differ from that by what packing had rounded away",
    }


def save_images(
    folder: Path,
    base: str,
    learner: Learner,
    *,
    classes: Sequence[str],
    preprocess: data.pixels.Preprocess,
    config: ExportConfig,
    random: bool = False,
) -> dict[str, Path]:
    """Writes adapter and merged checkpoint of a classifier of images, with the names of its classes.

    Args:
      folder: takes `adapter/` and `merged/`.
      base: the checkpoint that was fine-tuned, or that gave the shape.
      learner: what was trained, with the constants of its adapter.
      classes: in the order of the scores.
      preprocess: what is done to an image before the model sees it.
      config: which of the two to write, and how large a file may be.
      random: whether it began with random weights: there is no base to merge into then.

    Returns:
      {"adapter": folder, "merged": folder}, those written.
    """
    written, (family, shape) = {}, hub.read_config(hub.resolve(base), len(classes))
    _, plan, trained, frozen = learner
    adapter = tree.combine(trained["lora"], frozen["lora"]) if plan.lora else None
    params = trained.get("params", {})
    if adapter is not None and plan.lora and config.adapter:
        written["adapter"] = folder / "adapter"
        given = {"trained": params, "family": family, "base": base, "config": shape}
        hub.export_adapter(str(written["adapter"]), adapter, plan.lora, **given)
    if config.merged:
        written["merged"] = folder / "merged"
        if random:
            hub.export(str(written["merged"]), params, source=base, shard_gb=config.shard_gb, classes=classes)
        else:
            given = {"adapter": adapter, "trained": params, "shard_gb": config.shard_gb, "classes": classes}
            hub.merge(base, str(written["merged"]), **given)
    for path in written.values():
        if jax.process_index() == 0:
            data.images.save_labels(path, classes)
            _write_preprocess(path, preprocess, hub.resolve(base))
    return written


def _write_preprocess(folder: Path, preprocess: data.pixels.Preprocess, base: Path) -> None:
    """The base's own file, where that says the same; its words may be of a kind that we have none of."""
    own = base / data.pixels.FILE
    if own.is_file() and data.pixels.read(own) == preprocess:
        text = own.read_text(encoding="utf-8")
    else:
        text = json.dumps(data.pixels.describe(preprocess), indent=1) + "\n"
    (folder / data.pixels.FILE).write_text(text, encoding="utf-8")
