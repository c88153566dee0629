"""What a fine-tuning run leaves: the adapter, the merged checkpoint."""

from pathlib import Path

from jaxsft import hub, report, tree
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
