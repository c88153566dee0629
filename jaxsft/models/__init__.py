"""Models: one decoder, and a thin family file for each kind of checkpoint."""

from collections.abc import Mapping
from typing import Any

from jaxsft.models import (
    gemma,
    gemma2,
    gemma3,
    gpt2,
    gpt_oss,
    granite,
    llama,
    mistral,
    mixtral,
    olmo2,
    phi3,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_moe,
    smollm3,
)
from jaxsft.models.decoder import Cache, DecoderConfig, Model, build, logits, span, split
from jaxsft.models.family import Family, Name

FAMILIES: dict[str, Family] = {
    "gemma": gemma.FAMILY,
    "gemma2": gemma2.FAMILY,
    "gemma3_text": gemma3.FAMILY,
    "gpt2": gpt2.FAMILY,
    "gpt_oss": gpt_oss.FAMILY,
    "granite": granite.FAMILY,
    "llama": llama.FAMILY,
    "mistral": mistral.FAMILY,
    "mixtral": mixtral.FAMILY,
    "olmo2": olmo2.FAMILY,
    "phi3": phi3.FAMILY,
    "qwen2": qwen2.FAMILY,
    "qwen2_moe": qwen2_moe.FAMILY,
    "qwen3": qwen3.FAMILY,
    "qwen3_moe": qwen3_moe.FAMILY,
    "smollm3": smollm3.FAMILY,
}


def family_of(config: Mapping[str, Any]) -> Family:
    """Finds the family of a `config.json`.

    Raises:
      ValueError: its `model_type` is none of the known ones.

    Example:
      >>> family_of({"model_type": "llama"}) is FAMILIES["llama"]
      True
    """
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise ValueError(f"model_type {kind!r} is not supported; supported are {', '.join(FAMILIES)}")
    return FAMILIES[kind]


__all__ = [
    "FAMILIES",
    "Cache",
    "DecoderConfig",
    "Family",
    "Model",
    "Name",
    "build",
    "family_of",
    "logits",
    "span",
    "split",
]
