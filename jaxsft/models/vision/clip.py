"""CLIP's vision tower: ViT with a norm before the first block and none behind the last, pooled over its patches.

A classifier made of it is transformers' CLIPForImageClassification, which leaves out the norm and the projection that
compare an image with a text. Of a whole CLIP the text tower is not computed, and a classifier goes without it.
Source: Radford et al. 2021, arXiv:2103.00020.
"""

from collections.abc import Mapping
from typing import Any

from jax.sharding import PartitionSpec as P

from jaxsft.models import family
from jaxsft.models.family import Family, Name, Reader, Rules, read_classes
from jaxsft.models.vision import vit
from jaxsft.models.vision.tower import TowerConfig

CLASSIFIER = "CLIPForImageClassification"
# Of training, and of what an image and a text are compared with.
NEUTRAL = (
    "add_cross_attention",
    "dropout",
    "initializer_factor",
    "logit_scale_init_value",
    "projection_dim",
    "pruned_heads",
    "text_config",
    "tie_word_embeddings",
)


def read_tower(config: Mapping[str, Any], labels: int = 0) -> TowerConfig:
    """Reads the tower's own config."""
    read = Reader(config)
    read.skip(*NEUTRAL)
    how = {"pooling": "mean", "plain": True, "patch_bias": False, "embed_norm": True, "norm": False}
    eps = {"norm_eps": read("layer_norm_eps", 1e-5), "activation": read("hidden_act", "quick_gelu")}
    patch = {"patch": family.read_square(read, "patch_size", 32)}
    shape = vit.read_tower(read, labels=labels, **patch, **eps, **how)
    read.finish()
    return shape


def read_config(config: Mapping[str, Any]) -> TowerConfig:
    """Reads a tower's config, or the config of both towers that it is a part of."""
    if config.get("model_type") != "clip":
        return read_tower(config)
    read = Reader(config)
    read.skip(*NEUTRAL, "num_labels", "text_config_dict")
    # Old configs have the tower twice, and then transformers takes the second one's word.
    inner = {**read("vision_config", {}), **read("vision_config_dict", {})}
    labels = read_classes(read, CLASSIFIER)
    read.finish()
    return read_tower(inner, labels)


def names(base: str) -> tuple[Name, ...]:
    """The names of a tower called `base`."""
    layer = f"{base}.encoder.layers.{{layer}}"
    return (
        Name("embed/cls", f"{base}.embeddings.class_embedding"),
        Name("embed/positions", f"{base}.embeddings.position_embedding.weight"),
        *family.conv("embed/patch", f"{base}.embeddings.patch_embedding"),
        *family.norm("embed/norm", f"{base}.pre_layrnorm"),
        *family.norm("blocks/attn_norm", f"{layer}.layer_norm1"),
        *family.dense("blocks/attn/q", f"{layer}.self_attn.q_proj"),
        *family.dense("blocks/attn/k", f"{layer}.self_attn.k_proj"),
        *family.dense("blocks/attn/v", f"{layer}.self_attn.v_proj"),
        *family.dense("blocks/attn/o", f"{layer}.self_attn.out_proj"),
        *family.norm("blocks/mlp_norm", f"{layer}.layer_norm2"),
        *family.dense("blocks/mlp/up", f"{layer}.mlp.fc1"),
        *family.dense("blocks/mlp/down", f"{layer}.mlp.fc2"),
        *family.norm("norm", f"{base}.post_layernorm"),
        *family.dense("classifier", "classifier"),
    )


POSITIONS: Rules = (("embed/positions", P(None, "fsdp")),)
RULES: Rules = (*vit.TOWER, *POSITIONS, ("embed/cls", P("fsdp")))
LOST = (r"text_model\..*", r"(text|visual)_projection\.weight", "logit_scale", "logit_bias")
FAMILY = Family(
    read_config,
    names("vision_model"),
    RULES,
    prefix="vision_model.",
    copies=(),
    unused=(*LOST, r"(vision_model\.)?post_layernorm\..*"),
    lost=LOST,
    task=None,
    classifier=CLASSIFIER,
    parent="clip",
    checkpoints=(
        "openai/clip-vit-base-patch32",
        "openai/clip-vit-large-patch14",
        "laion/CLIP-ViT-B-32-laion2B-s34B-b79K",
    ),
)
