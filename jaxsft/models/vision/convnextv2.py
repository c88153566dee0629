"""ConvNeXt V2: ConvNeXt with a norm over an image's response inside the MLP, and without gains.

Source: Woo et al. 2023, arXiv:2301.00808.
"""

from collections.abc import Mapping
from typing import Any

from jax.sharding import PartitionSpec as P

from jaxsft.models.family import Family, Reader, Rules
from jaxsft.models.vision.convnext import RULES, names, read_convnext
from jaxsft.models.vision.depthwise import ConvNextConfig


def read_config(config: Mapping[str, Any]) -> ConvNextConfig:
    read = Reader(config)
    shape = read_convnext(read, FAMILY.classifier, gain=None, response=True)
    read.finish()
    return shape


RESPONSE: Rules = (("stage./[^/]+/response/(scale|bias)", P(None, None, None, None, "tensor")),)

FAMILY = Family(
    read_config,
    names("convnextv2"),
    (*RULES, *RESPONSE),
    prefix="convnextv2.",
    copies=(),
    task=None,
    classifier="ConvNextV2ForImageClassification",
    checkpoints=("facebook/convnextv2-tiny-1k-224", "facebook/convnextv2-atto-1k-224"),
)
