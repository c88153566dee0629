"""Qwen 2 and 2.5: Llama with biases on q, k, v and, in some, a sliding window on the upper layers.

Source: Yang et al. 2024, arXiv:2407.10671.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxsft.models.block import DecoderConfig
from jaxsft.models.family import Family, Reader, read_shape, read_types, with_windows
from jaxsft.models.llama import IN_BIASES, NAMES, WEIGHTS


def read_windows(read: Reader, layers: int) -> list[int | None]:
    """`layer_types` says it layer by layer; older configs give the first layer that has the window."""
    # What transformers means where a key is absent: 4096 positions, from layer 28 on.
    window = read("sliding_window", None if "sliding_window" in read.config else 4096)
    window = window if read("use_sliding_window", False) else None
    first = read("max_window_layers", 28)
    older = ["sliding_attention" if window and i >= first else "full_attention" for i in range(layers)]
    return [window if kind == "sliding_attention" else None for kind in read_types(read, older)]


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    read = Reader(config)
    shape = read_shape(read)
    windows = read_windows(read, shape.layers)
    read.expect("use_mrope", False)
    read.finish()
    return with_windows(dataclasses.replace(shape, qkv_bias=True), windows)


FAMILY = Family(
    read_config,
    NAMES,
    (*WEIGHTS, *IN_BIASES),
    classifier="Qwen2ForSequenceClassification",
    checkpoints=(
        "Qwen/Qwen2.5-0.5B-Instruct",
        "Qwen/Qwen2.5-7B-Instruct",
    ),
)
