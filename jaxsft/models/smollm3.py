"""SmolLM 3: Llama in which every fourth layer has no rope (Yang et al. 2025, arXiv:2501.18795), and may have a window.

Source: Bakouch et al. 2025, "SmolLM3: smol, multilingual, long-context reasoner".
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxsft.models.block import DecoderConfig
from jaxsft.models.family import Family, Reader, read_rope, read_shape, read_types, with_windows
from jaxsft.models.llama import NAMES, RULES
from jaxsft.models.rope import Rope


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    read = Reader(config)
    rope = read_rope(read, theta=2_000_000.0)
    shape = read_shape(read, rope, tied=True)
    every = read("no_rope_layer_interval", 4)
    has_rope = read("no_rope_layers", [int((i + 1) % every != 0) for i in range(shape.layers)])  # 1 where it turns
    if len(has_rope) != shape.layers:
        raise ValueError(f"config.json's no_rope_layers names {len(has_rope)} of {shape.layers} layers")
    window = read("sliding_window", None)
    window = window if read("use_sliding_window", False) else None
    usual = ["sliding_attention" if window and not turns else "full_attention" for turns in has_rope]
    types = read_types(read, usual)
    bias, mlp_bias = read("attention_bias", False), read("mlp_bias", False)
    ropes = tuple(rope if turns else Rope(kind="none") for turns in has_rope)
    shape = dataclasses.replace(
        shape, qkv_bias=bias, out_bias=bias, mlp_bias=mlp_bias, ropes=ropes if not all(has_rope) else None
    )
    read.expect("max_window_layers", config.get("max_window_layers"))  # of Qwen's code, read by nobody
    read.finish()
    return with_windows(shape, [window if kind == "sliding_attention" else None for kind in types])


FAMILY = Family(
    read_config, NAMES, RULES, classifier="SmolLM3ForSequenceClassification", checkpoints=("HuggingFaceTB/SmolLM3-3B",)
)
