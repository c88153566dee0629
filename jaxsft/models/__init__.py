"""Models: one decoder, one encoder, three networks of images, and a thin family file for each kind of checkpoint."""

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
from jaxsft.models.family import HEADS, TABLES, Family, ModelConfig, Name, VisionConfig, layers_of, with_labels
from jaxsft.models.model import Cache, Model, logits, span, split
from jaxsft.models.pooling import POOLINGS, pool, unit
from jaxsft.models.reward import last, scores
from jaxsft.models.vision import (
    clip,
    convnext,
    convnextv2,
    deit,
    depthwise,
    dinov2,
    dinov2_with_registers,
    residual,
    resnet,
    siglip,
    tower,
    vit,
)
from jaxsft.models.vision.depthwise import ConvNextConfig
from jaxsft.models.vision.residual import STATISTICS, ResNetConfig
from jaxsft.models.vision.tower import TowerConfig
from jaxsft.tree import Pattern

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

# Those of images; what reads texts is above.
VISION: dict[str, Family] = {
    "clip": clip.FAMILY._replace(prefix=""),
    "clip_vision_model": clip.FAMILY,
    "convnext": convnext.FAMILY,
    "convnextv2": convnextv2.FAMILY,
    "deit": deit.FAMILY,
    "dinov2": dinov2.FAMILY,
    "dinov2_with_registers": dinov2_with_registers.FAMILY,
    "resnet": resnet.FAMILY,
    "siglip": siglip.FAMILY._replace(prefix=""),
    "siglip_vision_model": siglip.FAMILY,
    "vit": vit.FAMILY,
}


def family_of(config: Mapping[str, Any]) -> Family:
    """Finds the family of a `config.json`.

    Raises:
      ValueError: its `model_type` is none of the known ones.

    Example:
      >>> family_of({"model_type": "llama"}) is FAMILIES["llama"]
      True
    """
    kind, known = config.get("model_type"), FAMILIES | VISION
    if kind not in known:
        raise ValueError(f"model_type {kind!r} is not supported; supported are {', '.join(known)}")
    return known[kind]


def build(
    config: ModelConfig,
    *,
    dtype: jax.typing.DTypeLike = jnp.float32,
    remat: str = "dots",
    lora_dropout: float = 0.0,
    mesh: Mesh | None = None,
    follows: Pattern = (),
    attention: str = "auto",
) -> Model:
    """Makes the functions of a model, as its config is; see `decoder.build`, and `build` of the other networks.

    `follows` are the addresses that train, which only a network with batch norms asks: see `vision.residual`.

    Raises:
      ValueError: as `decoder.build`; a kernel of attention for a network that has none.

    Example:
      >>> build(EncoderConfig(32, 8, 16, 2, heads=2, max_position=64)).config.mlm
      True
    """
    given: dict[str, Any] = {"dtype": dtype, "remat": remat, "lora_dropout": lora_dropout, "mesh": mesh}
    if isinstance(config, ResNetConfig | ConvNextConfig) and attention != "auto":
        raise ValueError(
            f"attention {attention!r} asks for a kernel, and a network of convolutions has none; take auto"
        )
    match config:
        case EncoderConfig():
            return encoder.build(config, **given, attention=attention)
        case TowerConfig():
            return tower.build(config, **given, attention=attention)
        case ResNetConfig():
            return residual.build(config, **given, follows=follows)
        case ConvNextConfig():
            return depthwise.build(config, **given)
    return decoder.build(config, **given, attention=attention)


__all__ = [
    "FAMILIES",
    "HEADS",
    "POOLINGS",
    "STATISTICS",
    "TABLES",
    "VISION",
    "Cache",
    "ConvNextConfig",
    "DecoderConfig",
    "EncoderConfig",
    "Family",
    "Model",
    "ModelConfig",
    "Name",
    "ResNetConfig",
    "TowerConfig",
    "VisionConfig",
    "build",
    "family_of",
    "last",
    "layers_of",
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
