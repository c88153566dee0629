"""Gemma 3 (text): Gemma 2 with norms of q and k for soft caps, five windowed layers to each full one, a rope for each.

Source: Gemma Team 2025, arXiv:2503.19786.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxsft.models.block import DecoderConfig
from jaxsft.models.family import Family, Reader, read_types, to_rope, with_windows
from jaxsft.models.gemma import read_gemma
from jaxsft.models.gemma2 import NAMES
from jaxsft.models.llama import RULES
from jaxsft.models.rope import Rope


def _ropes(read: Reader) -> dict[str, Rope]:
    """By kind of attention: nested in rope_parameters (transformers 5), or rope_scaling for the full layers (4)."""
    theta, local = read("rope_theta", 1_000_000.0), read("rope_local_base_freq", 10_000.0)
    nested, scaling = read("rope_parameters", {}), read("rope_scaling", {})
    if unknown := sorted(set(nested) - {"full_attention", "sliding_attention"}):
        raise ValueError(f"config.json's rope settings have kinds of layers that are not known: {', '.join(unknown)}")
    full = dict(nested.get("full_attention") or {}) | scaling
    sliding = dict(nested.get("sliding_attention") or {})
    return {
        "full_attention": to_rope(full, full.pop("rope_theta", theta)),
        "sliding_attention": to_rope(sliding, sliding.pop("rope_theta", local)),
    }


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    read = Reader(config)
    ropes = _ropes(read)
    shape = read_gemma(read, ropes["full_attention"])
    window = read("sliding_window", None if "sliding_window" in config else 4096)
    every = read("sliding_window_pattern", read("_sliding_window_pattern", 6))
    usual = ["full_attention" if (i + 1) % every == 0 else "sliding_attention" for i in range(shape.layers)]
    types = read_types(read, usual)
    shape = dataclasses.replace(
        shape,
        qk_norm="head",
        post_norm=True,
        ropes=tuple(ropes[kind] for kind in types),
        attn_scale=read("query_pre_attn_scalar", 256) ** -0.5,
        logit_soft_cap=read("final_logit_softcapping", None),
    )
    read.expect("attn_logit_softcapping", None)  # norms of q and k took its place; transformers does not read it
    read.expect("cache_implementation", "hybrid", None)
    read.finish()
    return with_windows(shape, [window if kind == "sliding_attention" else None for kind in types])


FAMILY = Family(
    read_config,
    NAMES,
    RULES,
    classifier="Gemma3TextForSequenceClassification",
    checkpoints=(
        "google/gemma-3-270m-it",
        "google/gemma-3-1b-it",
    ),
)
