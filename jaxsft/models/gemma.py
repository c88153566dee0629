"""Gemma: Llama with scaled embeddings, GELU, and norms that store their scale less 1.

Source: Gemma Team 2024, arXiv:2403.08295.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxsft.models.block import DecoderConfig
from jaxsft.models.family import Family, Reader, read_shape
from jaxsft.models.llama import NAMES, RULES
from jaxsft.models.rope import Rope


def read_gemma(read: Reader, rope: Rope | None = None) -> DecoderConfig:
    """What all Gemmas have in common."""
    shape = read_shape(read, rope, tied=True)
    bias = read("attention_bias", False)
    read.expect("use_bidirectional_attention", False, None)
    # The first Gemma's hidden_act says gelu, and its weights were trained with the tanh form, which transformers uses.
    old = read("hidden_act", "gelu_pytorch_tanh")
    activation = read("hidden_activation", "gelu_pytorch_tanh" if old == "gelu" else old)
    return dataclasses.replace(
        shape,
        head_dim=read("head_dim", 256),
        qkv_bias=bias,
        out_bias=bias,
        activation=activation,
        embed_scale=shape.hidden**0.5,
        norm_from_zero=True,
    )


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    read = Reader(config)
    shape = read_gemma(read)
    read.finish()
    return shape


FAMILY = Family(
    read_config,
    NAMES,
    RULES,
    classifier="GemmaForSequenceClassification",
    checkpoints=(
        "google/gemma-2b-it",
        "google/gemma-7b-it",
    ),
)
