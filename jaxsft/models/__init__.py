"""Models: one decoder and one encoder, and a thin family file for each kind of checkpoint."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxsft.models import (
    bert,
    decoder,
    encoder,
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
    roberta,
    smollm3,
)
from jaxsft.models.block import DecoderConfig
from jaxsft.models.decoder import shares_prompts
from jaxsft.models.encoder import EncoderConfig, relevance
from jaxsft.models.family import TABLES, Family, ModelConfig, Name, with_labels
from jaxsft.models.model import Cache, Model, logits, span, split
from jaxsft.models.pooling import POOLINGS, pool, unit
from jaxsft.models.reward import last, scores

FAMILIES: dict[str, Family] = {
    "bert": bert.FAMILY,
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
    "roberta": roberta.FAMILY,
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


def build(
    config: ModelConfig,
    *,
    dtype: jax.typing.DTypeLike = jnp.float32,
    remat: str = "none",
    lora_dropout: float = 0.0,
    mesh: Mesh | None = None,
) -> Model:
    """Makes the functions of a model, decoder or encoder as its config is; see `decoder.build`, `encoder.build`.

    Example:
      >>> build(EncoderConfig(32, 8, 16, 2, heads=2, max_position=64)).config.mlm
      True
    """
    make: Any = encoder.build if isinstance(config, EncoderConfig) else decoder.build
    return make(config, dtype=dtype, remat=remat, lora_dropout=lora_dropout, mesh=mesh)


__all__ = [
    "FAMILIES",
    "POOLINGS",
    "TABLES",
    "Cache",
    "DecoderConfig",
    "EncoderConfig",
    "Family",
    "Model",
    "ModelConfig",
    "Name",
    "build",
    "family_of",
    "last",
    "logits",
    "pool",
    "relevance",
    "scores",
    "shares_prompts",
    "span",
    "split",
    "unit",
    "with_labels",
]
