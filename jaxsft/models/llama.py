"""Llama 2 and 3, TinyLlama, SmolLM2 and what else calls itself `llama`.

Sources: Touvron et al. 2023, arXiv:2307.09288; Grattafiori et al. 2024, arXiv:2407.21783.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jax.sharding import PartitionSpec as P

from jaxsft.models.block import DecoderConfig
from jaxsft.models.family import SCORE, Family, Name, Reader, Rules, dense, read_shape


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    read = Reader(config)
    shape = read_shape(read)
    bias, mlp_bias = read("attention_bias", False), read("mlp_bias", False)
    read.expect("rope_interleaved", False)
    read.finish()
    return dataclasses.replace(shape, qkv_bias=bias, out_bias=bias, mlp_bias=mlp_bias)


LAYER = "model.layers.{layer}"
NAMES: tuple[Name, ...] = (
    Name("embed/table", "model.embed_tokens.weight"),
    *dense("blocks/attn/q", f"{LAYER}.self_attn.q_proj"),
    *dense("blocks/attn/k", f"{LAYER}.self_attn.k_proj"),
    *dense("blocks/attn/v", f"{LAYER}.self_attn.v_proj"),
    *dense("blocks/attn/o", f"{LAYER}.self_attn.o_proj"),
    *dense("blocks/mlp/gate", f"{LAYER}.mlp.gate_proj"),
    *dense("blocks/mlp/up", f"{LAYER}.mlp.up_proj"),
    *dense("blocks/mlp/down", f"{LAYER}.mlp.down_proj"),
    Name("blocks/attn/q_norm/scale", f"{LAYER}.self_attn.q_norm.weight"),
    Name("blocks/attn/k_norm/scale", f"{LAYER}.self_attn.k_norm.weight"),
    Name("blocks/attn_norm/scale", f"{LAYER}.input_layernorm.weight"),
    Name("blocks/mlp_norm/scale", f"{LAYER}.post_attention_layernorm.weight"),
    Name("norm/scale", "model.norm.weight"),
    Name("head/table", "lm_head.weight"),
    SCORE,
)

# The first axis of a stacked leaf is the layer. `tensor` cuts heads and the hidden units of the MLP, `fsdp` the rest.
WEIGHTS: Rules = (
    ("(embed|head)/table", P("tensor", "fsdp")),
    ("blocks/[^/]+/(attn/(q|k|v|qkv)|mlp/(gate|up|gate_up))/kernel", P(None, "fsdp", "tensor")),
    ("blocks/[^/]+/(attn/o|mlp/down)/kernel", P(None, "tensor", "fsdp")),
    ("blocks/[^/]+/(attn/[qk]_norm|(attn|mlp)(_post)?_norm)/(scale|bias)", P(None, None)),
    ("norm/(scale|bias)", P(None)),
    ("score/kernel", P("fsdp", None)),
)
# Biases of what makes heads and hidden units, and of what is made of them; families have both, the first, or neither.
IN_BIASES: Rules = (("blocks/[^/]+/(attn/(q|k|v|qkv)|mlp/(gate|up|gate_up))/bias", P(None, "tensor")),)
OUT_BIASES: Rules = (("blocks/[^/]+/(attn/o|mlp/down)/bias", P(None, None)),)
RULES: Rules = (*WEIGHTS, *IN_BIASES, *OUT_BIASES)

FAMILY = Family(
    read_config,
    NAMES,
    RULES,
    classifier="LlamaForSequenceClassification",
    checkpoints=(
        "meta-llama/Llama-3.2-1B-Instruct",
        "meta-llama/Llama-3.1-8B-Instruct",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
)
