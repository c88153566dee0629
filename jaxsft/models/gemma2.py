"""Gemma 2: norms before and after attention and MLP, soft caps on scores, a window on every other layer.

Source: Gemma Team 2024, arXiv:2408.00118.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxsft.models.block import DecoderConfig
from jaxsft.models.family import Family, Name, Reader, read_types, with_windows
from jaxsft.models.gemma import read_gemma
from jaxsft.models.llama import NAMES as LLAMA
from jaxsft.models.llama import RULES


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    read = Reader(config)
    shape = read_gemma(read)
    window = read("sliding_window", None if "sliding_window" in config else 4096)
    types = read_types(read, [("sliding_attention", "full_attention")[i % 2] for i in range(shape.layers)])
    cap = lambda key, usual: read(key, None if key in config else usual)
    shape = dataclasses.replace(
        shape,
        post_norm=True,
        attn_scale=read("query_pre_attn_scalar", 256) ** -0.5,
        attn_soft_cap=cap("attn_logit_softcapping", 50.0),
        logit_soft_cap=cap("final_logit_softcapping", 30.0),
    )
    read.expect("cache_implementation", "hybrid", None)
    read.finish()
    return with_windows(shape, [window if kind == "sliding_attention" else None for kind in types])


# What Llama calls the norm before the MLP is here the one after attention.
OTHER = {
    "blocks/attn_post_norm/scale": "post_attention_layernorm",
    "blocks/mlp_norm/scale": "pre_feedforward_layernorm",
    "blocks/mlp_post_norm/scale": "post_feedforward_layernorm",
}
NAMES = tuple(name for name in LLAMA if name.path not in OTHER)
NAMES += tuple(Name(path, f"model.layers.{{layer}}.{name}.weight") for path, name in OTHER.items())

FAMILY = Family(
    read_config,
    NAMES,
    RULES,
    classifier="Gemma2ForSequenceClassification",
    checkpoints=(
        "google/gemma-2-2b-it",
        "google/gemma-2-9b-it",
    ),
)
