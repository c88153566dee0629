"""GPT 2: learned positions, LayerNorm, a two-layer MLP, q, k, v in one kernel; kernels lie as they do here.

Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners".
"""

from collections.abc import Mapping
from typing import Any

from jax.sharding import PartitionSpec as P

from jaxsft.models import llama
from jaxsft.models.block import DecoderConfig
from jaxsft.models.family import SCORE, Family, Name, Reader, Rules, dense, norm, read_labels
from jaxsft.models.rope import Rope

LAYER = "transformer.h.{layer}"


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    read = Reader(config)
    hidden, heads, labels = read("n_embd", 768), read("n_head", 12), read_labels(read)
    shape = DecoderConfig(
        vocab_size=read("vocab_size", 50257),
        hidden=hidden,
        mlp_hidden=read("n_inner", 4 * hidden),
        layers=read("n_layer", 12),
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        max_position=read("n_positions", 1024),
        rope=Rope(kind="none"),
        norm_eps=read("layer_norm_epsilon", 1e-5),
        activation=read("activation_function", "gelu_new"),
        tied=read("tie_word_embeddings", True) and not labels,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        attn_scale=None if read("scale_attn_weights", True) else 1.0,
        norm="layer",
        gated=False,
        fused=True,
        learned_positions=True,
        labels=labels,
    )
    for key in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
        read.expect(key, False)
    read.expect("n_ctx", shape.max_position)
    read.skip("reorder_and_upcast_attn", "gradient_checkpointing")  # the scores are float32 here anyway
    read.skip(*(f"summary_{key}" for key in ("activation", "first_dropout", "proj_to_labels", "type", "use_proj")))
    read.finish()
    return shape


NAMES: tuple[Name, ...] = (
    Name("embed/table", "transformer.wte.weight"),
    Name("embed/positions", "transformer.wpe.weight"),
    *norm("blocks/attn_norm", f"{LAYER}.ln_1"),
    *dense("blocks/attn/qkv", f"{LAYER}.attn.c_attn", transposed=False),
    *dense("blocks/attn/o", f"{LAYER}.attn.c_proj", transposed=False),
    *norm("blocks/mlp_norm", f"{LAYER}.ln_2"),
    *dense("blocks/mlp/up", f"{LAYER}.mlp.c_fc", transposed=False),
    *dense("blocks/mlp/down", f"{LAYER}.mlp.c_proj", transposed=False),
    *norm("norm", "transformer.ln_f"),
    Name("head/table", "lm_head.weight"),
    SCORE,
)

RULES: Rules = (*llama.RULES, ("embed/positions", P(None, "fsdp")))
TIED = ("lm_head.weight", "transformer.wte.weight")
FAMILY = Family(
    read_config,
    NAMES,
    RULES,
    prefix="transformer.",
    copies=(TIED,),
    classifier="GPT2ForSequenceClassification",
    checkpoints=(
        "openai-community/gpt2",
        "distilbert/distilgpt2",
    ),
)
