"""DINOv2 with registers: tokens beside the patches that hold what is nobody's, which no pooling reads.

Source: Darcet et al. 2023, arXiv:2309.16588.
"""

from collections.abc import Mapping
from typing import Any

from jaxsft.models.family import Family, Name, Reader
from jaxsft.models.vision.dinov2 import names, read_dino
from jaxsft.models.vision.tower import TowerConfig
from jaxsft.models.vision.vit import ATTENTION, RULES, SWIGLU


def read_config(config: Mapping[str, Any]) -> TowerConfig:
    read = Reader(config)
    shape = read_dino(read, FAMILY.classifier, registers=read("num_register_tokens", 4), antialias=True)
    read.finish()
    return shape


FAMILY = Family(
    read_config,
    (
        *names("dinov2_with_registers"),
        Name("embed/registers", "dinov2_with_registers.embeddings.register_tokens"),
    ),
    RULES,
    prefix="dinov2_with_registers.",
    copies=(),
    unused=(r"(dinov2_with_registers\.)?embeddings\.mask_token",),
    modules=(*ATTENTION, SWIGLU),
    task=None,
    classifier="Dinov2WithRegistersForImageClassification",
    checkpoints=("facebook/dinov2-with-registers-small", "facebook/dinov2-with-registers-base"),
)
