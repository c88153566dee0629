"""Llama 2 and 3, TinyLlama, SmolLM2 and what else calls itself `llama`.

Sources: Touvron et al. 2023, arXiv:2307.09288; Grattafiori et al. 2024, arXiv:2407.21783.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jax.sharding import PartitionSpec as P

from jaxsft.models.decoder import DecoderConfig
from jaxsft.models.family import Family, Name, Reader, Rules, read_shape


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    read = Reader(config)
    shape = read_shape(read)
    bias, mlp_bias = read("attention_bias", False), read("mlp_bias", False)
    read.expect("rope_interleaved", False)
    read.finish()
    return dataclasses.replace(shape, qkv_bias=bias, out_bias=bias, mlp_bias=mlp_bias)


def _dense(here: str, there: str) -> tuple[Name, Name]:
    prefix = "model.layers.{layer}."
    return (
        Name(f"blocks/{here}/kernel", f"{prefix}{there}.weight", transposed=True),
        Name(f"blocks/{here}/bias", f"{prefix}{there}.bias"),
    )


NAMES: tuple[Name, ...] = (
    Name("embed/table", "model.embed_tokens.weight"),
    *_dense("attn/q", "self_attn.q_proj"),
    *_dense("attn/k", "self_attn.k_proj"),
    *_dense("attn/v", "self_attn.v_proj"),
    *_dense("attn/o", "self_attn.o_proj"),
    *_dense("mlp/gate", "mlp.gate_proj"),
    *_dense("mlp/up", "mlp.up_proj"),
    *_dense("mlp/down", "mlp.down_proj"),
    Name("blocks/attn/q_norm/scale", "model.layers.{layer}.self_attn.q_norm.weight"),
    Name("blocks/attn/k_norm/scale", "model.layers.{layer}.self_attn.k_norm.weight"),
    Name("blocks/attn_norm/scale", "model.layers.{layer}.input_layernorm.weight"),
    Name("blocks/mlp_norm/scale", "model.layers.{layer}.post_attention_layernorm.weight"),
    Name("norm/scale", "model.norm.weight"),
    Name("head/table", "lm_head.weight"),
)

# The first axis of a stacked leaf is the layer. `tensor` cuts heads and the hidden units of the MLP, `fsdp` the rest.
RULES: Rules = (
    ("(embed|head)/table", P("tensor", "fsdp")),
    ("blocks/[^/]+/(attn/[qkv]|mlp/(gate|up))/kernel", P(None, "fsdp", "tensor")),
    ("blocks/[^/]+/(attn/o|mlp/down)/kernel", P(None, "tensor", "fsdp")),
    ("blocks/[^/]+/(attn/[qkv]|mlp/(gate|up))/bias", P(None, "tensor")),
    ("blocks/[^/]+/(attn/o|mlp/down)/bias", P(None, None)),
    ("blocks/[^/]+/(attn/[qk]_norm|(attn|mlp)(_post)?_norm)/scale", P(None, None)),
    ("norm/scale", P(None)),
)

FAMILY = Family(read_config, NAMES, RULES)
