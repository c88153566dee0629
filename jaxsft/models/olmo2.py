"""OLMo 2: norms after attention and MLP, none before, and norms over all of q and of k.

Source: OLMo Team 2024, arXiv:2501.00656.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxsft.models.block import DecoderConfig
from jaxsft.models.family import Family, Reader, read_shape
from jaxsft.models.gemma2 import NAMES
from jaxsft.models.llama import RULES


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    read = Reader(config)
    shape = read_shape(read)
    bias, eps = read("attention_bias", False), read("rms_norm_eps", 1e-5)
    read.finish()
    how = {"norm_eps": eps, "qk_norm": "all", "pre_norm": False, "post_norm": True}
    return dataclasses.replace(shape, qkv_bias=bias, out_bias=bias, **how)


FAMILY = Family(
    read_config,
    NAMES,
    RULES,
    classifier="Olmo2ForSequenceClassification",
    checkpoints=(
        "allenai/OLMo-2-0425-1B-Instruct",
        "allenai/OLMo-2-1124-7B-Instruct",
    ),
)
