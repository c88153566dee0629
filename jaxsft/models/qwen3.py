"""Qwen 3 (dense): Llama with RMSNorm over each head's q and k.

Source: Yang et al. 2025, arXiv:2505.09388.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxsft.models.block import DecoderConfig
from jaxsft.models.family import Family, Reader, read_shape, with_windows
from jaxsft.models.llama import NAMES, RULES
from jaxsft.models.qwen2 import read_windows


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    read = Reader(config)
    shape = read_shape(read)
    # Qwen 3 sets head_dim apart from hidden_size / heads, and its default is 128.
    head_dim, bias = read("head_dim", 128), read("attention_bias", False)
    windows = read_windows(read, shape.layers)
    read.finish()
    shape = dataclasses.replace(shape, head_dim=head_dim, qkv_bias=bias, out_bias=bias, qk_norm="head")
    return with_windows(shape, windows)


FAMILY = Family(
    read_config,
    NAMES,
    RULES,
    classifier="Qwen3ForSequenceClassification",
    checkpoints=(
        "Qwen/Qwen3-0.6B",
        "Qwen/Qwen3-8B",
    ),
)
