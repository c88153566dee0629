"""What a fine-tuning run leaves: the adapter, the merged checkpoint."""

from collections.abc import Mapping
from pathlib import Path

from jaxsft import hub, tree
from jaxsft.hub import ExportConfig
from jaxsft.tuning import Plan


def save(
    folder: Path, base: str, plan: Plan, trained: Mapping, frozen: Mapping, *, tokenizer, config: ExportConfig
) -> dict[str, Path]:
    """Writes adapter and merged checkpoint of what a run trained.

    Args:
      folder: takes `adapter/` and `merged/`.
      base: the checkpoint that was fine-tuned.
      plan: what trained, from `tuning.plan`.
      trained: `State.trainable`, or the same tree of a checkpoint.
      frozen: what did not train beside it, for the constants of an adapter.
      tokenizer: the run's, whose chat template goes along where the base has none.
      config: which of the two to write, and how large a file may be.

    Returns:
      {"adapter": folder, "merged": folder}, those written.
    """
    written, family = {}, hub.read_config(hub.resolve(base))[0]
    adapter = tree.combine(trained["lora"], frozen["lora"]) if plan.lora else None
    params = trained.get("params", {})
    if adapter is not None and plan.lora and config.adapter:
        written["adapter"] = folder / "adapter"
        hub.export_adapter(str(written["adapter"]), adapter, plan.lora, trained=params, family=family, base=base)
        hub.save_template(written["adapter"], tokenizer)
    if config.merged:
        written["merged"] = folder / "merged"
        hub.merge(base, str(written["merged"]), adapter=adapter, trained=params, shard_gb=config.shard_gb)
        hub.save_template(written["merged"], tokenizer)
    return written
