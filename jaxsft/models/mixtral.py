"""Mixtral: Mistral with a mixture of experts in every layer's MLP.

Source: Jiang et al. 2024, arXiv:2401.04088.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jax.sharding import PartitionSpec as P

from jaxsft.models import llama
from jaxsft.models.block import DecoderConfig
from jaxsft.models.family import Family, Name, Reader, Rules, dense, read_rope, read_shape, with_windows
from jaxsft.models.llama import LAYER
from jaxsft.models.moe import MoE


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    read = Reader(config)
    shape = read_shape(read, read_rope(read, theta=1_000_000.0))
    window = read("sliding_window", None)
    moe = MoE(
        experts=read("num_local_experts", 8),
        active=read("num_experts_per_tok", 2),
        hidden=shape.mlp_hidden,
        balance=read("router_aux_loss_coef", 0.001),
    )
    read.expect("router_jitter_noise", 0.0)
    read.finish()
    shape = dataclasses.replace(shape, moe=moe, norm_eps=config.get("rms_norm_eps", 1e-5))
    return with_windows(shape, [window] * shape.layers)


NAMES: tuple[Name, ...] = (
    *llama.NAMES,
    *dense("blocks/moe/router", f"{LAYER}.block_sparse_moe.gate"),
    *dense("blocks/moe/experts/gate", f"{LAYER}.block_sparse_moe.experts.{{expert}}.w1"),
    *dense("blocks/moe/experts/up", f"{LAYER}.block_sparse_moe.experts.{{expert}}.w3"),
    *dense("blocks/moe/experts/down", f"{LAYER}.block_sparse_moe.experts.{{expert}}.w2"),
)

# `expert` cuts the experts, `tensor` the hidden units of each.
MIXTURE: Rules = (
    ("blocks/[^/]+/moe/experts/(gate|up|gate_up)/kernel", P(None, "expert", "fsdp", "tensor")),
    ("blocks/[^/]+/moe/experts/down/kernel", P(None, "expert", "tensor", "fsdp")),
    ("blocks/[^/]+/moe/(router|shared_gate)/kernel", P(None, "fsdp", None)),
)

FAMILY = Family(
    read_config,
    NAMES,
    (*llama.WEIGHTS, *MIXTURE),
    classifier="MixtralForSequenceClassification",
    checkpoints=("mistralai/Mixtral-8x7B-Instruct-v0.1",),
)
