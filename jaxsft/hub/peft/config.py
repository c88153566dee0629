"""PEFT's `adapter_config.json`: every key is read, known to change nothing, or refused by its name.

Patterns there are regular expressions over PEFT's module names, `model.layers.0.self_attn.q_proj`, of which they may
leave out the beginning.
"""

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxsft import lora
from jaxsft.hub.files import CheckpointError, read_json
from jaxsft.hub.peft.names import CONFIG
from jaxsft.lora import LoRA

READ = frozenset(
    "alpha_pattern bias ensure_weight_tying init_lora_weights lora_alpha lora_dropout modules_to_save peft_type r "
    "rank_pattern target_modules task_type trainable_token_indices use_dora use_rslora".split()
)
# How the adapter was made, found its layers or is run; what it computes does not depend on these. PEFT itself sets
# fan_in_fan_out right for each layer.
NEUTRAL = frozenset(
    "auto_mapping base_model_name_or_path corda_config eva_config exclude_modules fan_in_fan_out inference_mode "
    "layers_pattern layers_to_transform loftq_config lora_ga_config megatron_config megatron_core peft_version "
    "qalora_group_size revision runtime_config".split()
)
PLAIN = (None, True, False, "gaussian", "eva", "orthogonal", "mica")  # starts that leave the base as it is
CONVERT = "PEFT's save_pretrained makes a plain one of it with path_initial_model_for_weight_conversion"


class Settings(NamedTuple):
    """What a folder's configuration says."""

    spec: LoRA
    ranks: Mapping[str, int]  # by PEFT's patterns
    alphas: Mapping[str, float]
    saved: tuple[str, ...]  # ends of the names of modules that replace the base's
    tied: bool  # the output layer goes with the embedding where that was trained
    tokens: Mapping[str, tuple[int, ...]]  # of which rows trained alone, by the ends of the names of modules
    task: str | None  # PEFT's word for what the model does

    def of(self, module: str) -> LoRA:
        """Rank and alpha of one of PEFT's modules, as a shape of its own."""
        rank = self.ranks.get(pattern_of(self.ranks, module), self.spec.rank)
        alpha = self.alphas.get(pattern_of(self.alphas, module), self.spec.alpha)
        return LoRA(rank, float(alpha), rslora=self.spec.rslora, init=self.spec.init)

    def tokens_of(self, module: str) -> tuple[int, ...]:
        """The tokens of which a module has trained rows."""
        return next((rows for end, rows in self.tokens.items() if module.endswith(end)), ())

    def scale(self, module: str) -> float:
        return lora.scale(self.of(module), "")


def pattern_of(patterns: Mapping[str, Any], module: str) -> str:
    """The first pattern that matches a module, or the module itself; as PEFT's get_pattern_key.

    Example:
      >>> pattern_of({"mlp.up_proj": 8, "up_proj": 4}, "model.layers.0.mlp.up_proj")
      'mlp.up_proj'
    """
    return next((key for key in patterns if re.match(rf"(.*\.)?({key})$", module)), module)


def read_settings(folder: Path) -> Settings:
    """Reads `adapter_config.json`.

    Raises:
      CheckpointError: no LoRA, or a setting that is not supported.
    """
    config, file = read_json(folder / CONFIG), folder / CONFIG
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{file} has peft_type {config.get('peft_type')!r}; only LORA is supported")
    for key, value in config.items():
        if key not in READ | NEUTRAL and value not in (None, False, "none", [], {}):
            raise CheckpointError(f"{file} sets {key!r} to {value!r}, which is not supported")
    start = config.get("init_lora_weights")
    start = start.lower() if isinstance(start, str) else start
    if start not in (*PLAIN, *lora.STARTS):
        raise CheckpointError(
            f"{file} sets 'init_lora_weights' to {start!r}, which is not supported: such an adapter belongs to a base"
            f" that was changed and cannot be told from the checkpoint. {CONVERT}"
        )
    spec = LoRA(
        rank=config.get("r", 8),
        alpha=float(config.get("lora_alpha", 8)),
        dropout=float(config.get("lora_dropout", 0.0)),
        rslora=bool(config.get("use_rslora", False)),
        dora=bool(config.get("use_dora", False)),
        init=start if start in lora.STARTS else "lora",  # type: ignore[arg-type]
    )
    ranks, alphas = (config.get(key) or {} for key in ("rank_pattern", "alpha_pattern"))
    saved, tied = tuple(config.get("modules_to_save") or ()), bool(config.get("ensure_weight_tying", False))
    tokens = config.get("trainable_token_indices") or {}
    tokens = {"": tokens} if isinstance(tokens, list) else tokens  # of the embedding
    tokens = {module: tuple(rows) for module, rows in tokens.items()}
    return Settings(spec, ranks, alphas, saved, tied, tokens, config.get("task_type"))


def to_config(
    sizes: Mapping[str, tuple[int, float]], spec: LoRA, *, base: str, task: str | None = "CAUSAL_LM", **more: Any
) -> dict[str, Any]:
    """The configuration of an adapter.

    Args:
      sizes: rank and scale of each of PEFT's modules; what most have is the rule, the others get a pattern each.
      spec: for dropout, rsLoRA.
      base: the base's folder or hub name.
      task: PEFT's word for what the model does.
      more: keys that are written where they are not empty.

    Example:
      >>> found = to_config({"x.q": (4, 2.0), "x.k": (4, 2.0), "x.v": (2, 2.0)}, LoRA(), base="org/base")
      >>> found["r"], found["lora_alpha"], found["rank_pattern"], found["alpha_pattern"]
      (4, 8.0, {'x.v': 2}, {'x.v': 4.0})
    """
    width = (lambda r: r**0.5) if spec.rslora else (lambda r: r)
    # Scales are float32; seven digits are all that alpha has to say.
    alphas = {module: float(f"{scale * width(r):.7g}") for module, (r, scale) in sizes.items()}
    [(rank, _)] = Counter(r for r, _ in sizes.values()).most_common(1)
    [(alpha, _)] = Counter(alphas.values()).most_common(1)
    more["rank_pattern"] = {module: r for module, (r, _) in sizes.items() if r != rank}
    more["alpha_pattern"] = {module: a for module, a in alphas.items() if a != alpha}
    return {
        "peft_type": "LORA",
        "task_type": task,
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": spec.dropout,
        "use_rslora": spec.rslora,
        "target_modules": sorted(sizes),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        **{key: value for key, value in more.items() if value},
    }
