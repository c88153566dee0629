"""SigLIP's vision tower: ViT without a class token, pooled over its patches.

A classifier made of it is transformers' SiglipForImageClassification, which takes the mean of the patches; attention
pooling, for comparisons of an image with a text, is carried along, not computed. Of a whole SigLIP the text tower is
not computed, and a classifier goes without it.
Source: Zhai et al. 2023, arXiv:2303.15343.
"""

from collections.abc import Mapping
from typing import Any

from jaxsft.models.family import Family, Reader, read_classes
from jaxsft.models.vision import clip, vit
from jaxsft.models.vision.tower import TowerConfig

CLASSIFIER = "SiglipForImageClassification"


def read_tower(config: Mapping[str, Any], labels: int = 0) -> TowerConfig:
    """Reads the tower's own config."""
    read = Reader(config)
    read.skip("vision_use_head", *clip.NEUTRAL)
    eps = {"norm_eps": read("layer_norm_eps", 1e-6), "activation": read("hidden_act", "gelu_pytorch_tanh")}
    shape = vit.read_tower(read, labels=labels, pooling="mean", cls=False, plain=True, **eps)
    read.finish()
    return shape


def read_config(config: Mapping[str, Any]) -> TowerConfig:
    """Reads a tower's config, or the config of both towers that it is a part of."""
    if config.get("model_type") != "siglip":
        return read_tower(config)
    read = Reader(config)
    read.skip(*clip.NEUTRAL, "num_labels")
    inner, labels = read("vision_config", {}), read_classes(read, CLASSIFIER)
    read.finish()
    return read_tower(inner, labels)


FAMILY = Family(
    read_config,
    clip.names("vision_model"),
    (*vit.TOWER, *vit.NORM, *clip.POSITIONS),
    prefix="vision_model.",
    copies=(),
    unused=(*clip.LOST, r"(vision_model\.)?head\..*"),
    lost=clip.LOST,
    task=None,
    classifier=CLASSIFIER,
    parent="siglip",
    checkpoints=("google/siglip-base-patch16-224", "google/siglip-so400m-patch14-384"),
)
