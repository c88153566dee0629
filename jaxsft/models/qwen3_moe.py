"""Qwen 3 MoE: Qwen 3 with a mixture of many small experts.

Source: Yang et al. 2025, arXiv:2505.09388.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxsft.models import llama
from jaxsft.models.block import DecoderConfig
from jaxsft.models.family import Family, Reader, read_shape, with_windows
from jaxsft.models.mixtral import MIXTURE
from jaxsft.models.qwen2_moe import NAMES, read_moe


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    read = Reader(config)
    shape = read_shape(read)
    moe = read_moe(read, shape.layers, experts=128, active=8, hidden=768)
    bias = read("attention_bias", False)
    window = read("sliding_window", None if "sliding_window" in config else 4096)
    window = window if read("use_sliding_window", False) else None
    read.skip("max_window_layers")  # transformers gives every layer the window, or none
    read.finish()
    shape = dataclasses.replace(shape, qkv_bias=bias, out_bias=bias, qk_norm="head", moe=moe)
    return with_windows(shape, [window] * shape.layers)


FAMILY = Family(
    read_config,
    NAMES,
    (*llama.RULES, *MIXTURE),
    classifier="Qwen3MoeForSequenceClassification",
    checkpoints=("Qwen/Qwen3-30B-A3B",),
)
