"""DeiT: ViT with a second token, which was taught by another network and is not asked here.

The distilled checkpoints' own two heads (...WithTeacher) are carried along, not computed: they answer for two tokens.
Source: Touvron et al. 2020, arXiv:2012.12877.
"""

from collections.abc import Mapping
from typing import Any

from jaxsft.models.family import Family, Name, Reader, read_classes
from jaxsft.models.vision.tower import TowerConfig
from jaxsft.models.vision.vit import MODULES, RULES, names, read_tower


def read_config(config: Mapping[str, Any]) -> TowerConfig:
    read = Reader(config)
    given = {"labels": read_classes(read, FAMILY.classifier), "qkv_bias": read("qkv_bias", True)}
    shape = read_tower(read, distillation=True, **given)
    read.finish()
    return shape


LOST = (
    r"(deit\.)?pooler\..*",
    r"(deit\.)?embeddings\.mask_token",
    r"decoder\..*",
    r"(cls|distillation)_classifier\..*",
)
FAMILY = Family(
    read_config,
    (*names("deit"), Name("embed/distillation", "deit.embeddings.distillation_token")),
    RULES,
    prefix="deit.",
    copies=(),
    unused=LOST,
    lost=LOST,
    modules=MODULES,
    task=None,
    classifier="DeiTForImageClassification",
    checkpoints=("facebook/deit-base-distilled-patch16-224", "facebook/deit-tiny-distilled-patch16-224"),
)
