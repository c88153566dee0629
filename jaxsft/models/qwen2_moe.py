"""Qwen 1.5 and 2 MoE: Qwen 2 with many small experts, and an MLP beside them that every token meets.

Source: Yang et al. 2024, arXiv:2407.10671, section 2.2.2.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jax.sharding import PartitionSpec as P

from jaxsft.models import llama
from jaxsft.models.block import DecoderConfig
from jaxsft.models.family import Family, Name, Reader, Rules, dense, read_shape, read_types, with_windows
from jaxsft.models.llama import LAYER
from jaxsft.models.mixtral import MIXTURE
from jaxsft.models.moe import MoE


def read_moe(read: Reader, layers: int, *, experts: int, active: int, hidden: int, shared: int = 0) -> MoE:
    """Reads the keys that the mixtures of Qwen 2 and Qwen 3 share; the numbers are transformers' defaults."""
    every, plain = read("decoder_sparse_step", 1), read("mlp_only_layers", [])
    return MoE(
        experts=read("num_experts", read("num_local_experts", experts)),
        active=read("num_experts_per_tok", active),
        hidden=read("moe_intermediate_size", hidden),
        normalised=read("norm_topk_prob", False),
        shared=shared,
        dense=tuple(i for i in range(layers) if i in plain or (i + 1) % every),
        balance=read("router_aux_loss_coef", 0.001),
    )


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    read = Reader(config)
    shape = read_shape(read)
    shared = read("shared_expert_intermediate_size", 5632)
    moe = read_moe(read, shape.layers, experts=60, active=4, hidden=1408, shared=shared)
    bias = read("qkv_bias", True)
    window = read("sliding_window", None if "sliding_window" in config else 4096)
    window = window if read("use_sliding_window", False) else None
    below = read("max_window_layers", 28)
    slides = lambda i: window and i < below and i % 2 == 0
    types = read_types(read, ["sliding_attention" if slides(i) else "full_attention" for i in range(shape.layers)])
    read.finish()
    shape = dataclasses.replace(shape, qkv_bias=bias, moe=moe)
    return with_windows(shape, [window if kind == "sliding_attention" else None for kind in types])


NAMES: tuple[Name, ...] = (
    *llama.NAMES,
    *dense("blocks/moe/router", f"{LAYER}.mlp.gate"),
    *(
        name
        for product in ("gate", "up", "down")
        for name in (
            *dense(f"blocks/moe/experts/{product}", f"{LAYER}.mlp.experts.{{expert}}.{product}_proj"),
            *dense(f"blocks/moe/shared/{product}", f"{LAYER}.mlp.shared_expert.{product}_proj"),
        )
    ),
    *dense("blocks/moe/shared_gate", f"{LAYER}.mlp.shared_expert_gate"),
)

RULES: Rules = (
    *llama.WEIGHTS,
    *llama.IN_BIASES,
    *MIXTURE,
    ("blocks/[^/]+/moe/shared/(gate|up)/kernel", P(None, "fsdp", "tensor")),
    ("blocks/[^/]+/moe/shared/down/kernel", P(None, "tensor", "fsdp")),
)

FAMILY = Family(
    read_config,
    NAMES,
    RULES,
    classifier="Qwen2MoeForSequenceClassification",
    checkpoints=("Qwen/Qwen1.5-MoE-A2.7B-Chat",),
)
