"""Granite 3: Llama with four multipliers, of embeddings, scores, residuals and logits.

Source: Granite Team 2024, "Granite 3.0 Language Models".
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxsft.models.block import DecoderConfig
from jaxsft.models.family import Family, Reader, read_shape
from jaxsft.models.llama import NAMES, RULES


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    read = Reader(config)
    shape = read_shape(read)
    bias = read("attention_bias", False)
    shape = dataclasses.replace(
        shape,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=read("mlp_bias", False),
        embed_scale=float(read("embedding_multiplier", 1.0)),
        attn_scale=float(read("attention_multiplier", 1.0)),
        residual_scale=float(read("residual_multiplier", 1.0)),
        logit_scale=1 / float(read("logits_scaling", 1.0)),
    )
    read.finish()
    return shape


FAMILY = Family(
    read_config,
    NAMES,
    RULES,
    checkpoints=(
        "ibm-granite/granite-3.3-2b-instruct",
        "ibm-granite/granite-3.3-8b-instruct",
    ),
)
