"""Phi 3 and Phi 4 (mini): Llama with q, k, v in one kernel, gate and up in another, and longrope.

The fused kernels stay as the checkpoint has them: with the mesh axis "tensor" above 1 their results are exchanged
between devices before they are split. Source: Abdin et al. 2024, arXiv:2404.14219.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxsft.models import llama
from jaxsft.models.block import DecoderConfig
from jaxsft.models.family import Family, Name, Reader, dense, read_shape, to_rope, with_windows
from jaxsft.models.llama import LAYER, WEIGHTS
from jaxsft.models.rope import Rope


def _rope(read: Reader) -> Rope:
    """Its longrope is called su or yarn in old configs, and the original length stands beside the rope's own keys."""
    theta, partial = read("rope_theta", 10_000.0), read("partial_rotary_factor", 1.0)
    scaling = dict(read("rope_parameters", None) or read("rope_scaling", None) or {})
    longest = read("max_position_embeddings", 4096)
    original = read("original_max_position_embeddings", longest)
    kind = scaling.get("rope_type") or scaling.get("type")
    if kind in ("su", "yarn", "longrope"):
        scaling["rope_type"] = "longrope"
        scaling.setdefault("original_max_position_embeddings", original)
    scaling.setdefault("partial_rotary_factor", partial)
    return to_rope(scaling, scaling.pop("rope_theta", theta), longest)


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    read = Reader(config)
    shape = read_shape(read, _rope(read))
    window = read("sliding_window", None)
    read.expect("attention_bias", False)
    read.finish()
    shape = dataclasses.replace(shape, fused=True, norm_eps=config.get("rms_norm_eps", 1e-5))
    return with_windows(shape, [window] * shape.layers)


SPLIT = ("blocks/attn/q/", "blocks/attn/k/", "blocks/attn/v/", "blocks/mlp/gate/", "blocks/mlp/up/")
NAMES: tuple[Name, ...] = (
    *(name for name in llama.NAMES if not name.path.startswith(SPLIT)),
    *dense("blocks/attn/qkv", f"{LAYER}.self_attn.qkv_proj"),
    *dense("blocks/mlp/gate_up", f"{LAYER}.mlp.gate_up_proj"),
)

FAMILY = Family(
    read_config,
    NAMES,
    WEIGHTS,
    classifier="Phi3ForSequenceClassification",
    checkpoints=(
        "microsoft/Phi-3.5-mini-instruct",
        "microsoft/phi-4",
    ),
)
