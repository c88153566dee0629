"""gpt-oss: windows on every other layer, sinks in attention, a mixture of experts with clamped units.

Its gate and up are interleaved in one kernel; a file holds the kernels of all experts in one tensor.
Source: OpenAI 2025, arXiv:2508.10925.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jax.sharding import PartitionSpec as P

from jaxsft.models import llama
from jaxsft.models.block import DecoderConfig
from jaxsft.models.family import Family, Name, Reader, Rules, dense, read_shape, read_types, to_rope, with_windows
from jaxsft.models.llama import LAYER
from jaxsft.models.mixtral import MIXTURE
from jaxsft.models.moe import MoE

YARN = {"rope_type": "yarn", "factor": 32.0, "truncate": False, "original_max_position_embeddings": 4096}


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    read = Reader(config)
    theta = read("rope_theta", 150_000.0)
    scaling = dict(read("rope_parameters", None) or read("rope_scaling", None) or YARN)
    shape = read_shape(read, to_rope(scaling, scaling.pop("rope_theta", theta)))
    head_dim, bias = read("head_dim", 64), read("attention_bias", True)
    window = read("sliding_window", None if "sliding_window" in config else 128)
    usual = ["full_attention" if i % 2 else "sliding_attention" for i in range(shape.layers)]
    types = read_types(read, usual)
    moe = MoE(
        experts=read("num_local_experts", read("num_experts", 128)),
        active=read("num_experts_per_tok", read("experts_per_token", 4)),
        hidden=shape.mlp_hidden,
        balance=read("router_aux_loss_coef", 0.001),
        kind="clamped",
        limit=read("swiglu_limit", 7.0),
        alpha=read("swiglu_alpha", 1.702),
    )
    read.skip("experts_per_token", "initial_context_length")  # other words for what is read above
    read.finish()
    shape = dataclasses.replace(
        shape,
        head_dim=head_dim,
        norm_eps=config.get("rms_norm_eps", 1e-5),
        qkv_bias=bias,
        out_bias=bias,
        sinks=True,
        moe=moe,
    )
    return with_windows(shape, [window if kind == "sliding_attention" else None for kind in types])


NAMES: tuple[Name, ...] = (
    *llama.NAMES,
    Name("blocks/attn/sinks", f"{LAYER}.self_attn.sinks"),
    *dense("blocks/moe/router", f"{LAYER}.mlp.router"),
    Name("blocks/moe/experts/gate_up/kernel", f"{LAYER}.mlp.experts.gate_up_proj"),
    Name("blocks/moe/experts/gate_up/bias", f"{LAYER}.mlp.experts.gate_up_proj_bias"),
    Name("blocks/moe/experts/down/kernel", f"{LAYER}.mlp.experts.down_proj"),
    Name("blocks/moe/experts/down/bias", f"{LAYER}.mlp.experts.down_proj_bias"),
)
RULES: Rules = (
    *llama.RULES,
    *MIXTURE,
    ("blocks/[^/]+/moe/experts/gate_up/bias", P(None, "expert", "tensor")),
    ("blocks/[^/]+/moe/experts/down/bias", P(None, "expert", None)),
    ("blocks/[^/]+/moe/router/bias", P(None, None)),
    ("blocks/[^/]+/attn/sinks", P(None, None)),
)

FAMILY = Family(
    read_config, NAMES, RULES, classifier="GptOssForSequenceClassification", checkpoints=("unsloth/gpt-oss-20b-BF16",)
)
