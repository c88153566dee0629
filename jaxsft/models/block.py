"""One layer of the decoder: attention over packed rows or a cache, then an MLP or a mixture of them.

What differs between families is a number or a switch in `DecoderConfig`.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from jaxsft.models import rope as rotary
from jaxsft.models.attention import NO_WINDOW, Where, attend, recall
from jaxsft.models.layers import ACTIVATIONS, MLP, Dense, GatedMLP, LayerNorm, RMSNorm, fan_out
from jaxsft.models.model import Cache
from jaxsft.models.moe import Mixture, MoE


@dataclass(frozen=True)
class DecoderConfig:
    """The numbers that make a checkpoint's architecture; families read them from `config.json`."""

    vocab_size: int
    hidden: int
    mlp_hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    max_position: int
    rope: rotary.Rope = rotary.Rope()
    norm_eps: float = 1e-6
    activation: str = "silu"
    tied: bool = False  # the output layer is the embedding
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: Literal["", "head", "all"] = ""  # RMSNorm of q and k, over each head (Qwen 3) or all of them (OLMo 2)
    windows: tuple[int | None, ...] | None = None  # sliding window of each layer; None: none has one
    ropes: tuple[rotary.Rope, ...] | None = None  # of each layer, where they differ
    pre_norm: bool = True  # of what attention and MLP read
    post_norm: bool = False  # of what they add (Gemma 2, OLMo 2)
    norm_from_zero: bool = False  # norms store their scale less 1 (Gemma)
    embed_scale: float = 1.0  # of embeddings
    residual_scale: float = 1.0  # of what attention and MLP add (Granite)
    attn_scale: float | None = None  # of scores, in 1 / sqrt(head_dim)'s place
    attn_soft_cap: float | None = None
    logit_scale: float = 1.0
    logit_soft_cap: float | None = None
    norm: Literal["rms", "layer"] = "rms"
    gated: bool = True  # the MLP; else it has two layers (GPT 2)
    fused: bool = False  # q, k, v are one kernel "qkv"; gate and up one kernel "gate_up" (Phi 3)
    learned_positions: bool = False  # a table added to the embeddings (GPT 2)
    sinks: bool = False  # every head has a score that takes weight and gives nothing (gpt-oss)
    moe: MoE | None = None
    labels: int = 0  # 0 predicts tokens; 1 scores texts: a reward model, with `score` in the output layer's place

    def __post_init__(self):
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation {self.activation!r} is not known; known are {', '.join(ACTIVATIONS)}")
        if self.heads % self.kv_heads:
            raise ValueError(
                f"{self.heads} heads cannot share {self.kv_heads} key heads; the one must divide the other"
            )


def ropes_of(config: DecoderConfig) -> tuple[rotary.Rope, ...]:
    """That of each layer."""
    return config.ropes or (config.rope,) * config.layers


def turns_late(config: DecoderConfig) -> bool:
    """Whether a document's length decides how its tokens turn, so that a key turns anew as its document grows."""
    return any(rope.kind in rotary.BY_LENGTH for rope in ropes_of(config))


class Turn(NamedTuple):
    """Cosine and sine of the angles by which queries and keys turn; `slots` where the cache holds keys unturned."""

    tokens: tuple[Float[Array, "B T 1 half"], Float[Array, "B T 1 half"]]
    slots: tuple[Float[Array, "B S 1 half"], Float[Array, "B S 1 half"]] | None = None


def norm_of(c: DecoderConfig, name: str | None = None) -> nn.Module:
    """RMSNorm or LayerNorm, as the config has it."""
    return LayerNorm(c.norm_eps, name=name) if c.norm == "layer" else RMSNorm(c.norm_eps, c.norm_from_zero, name=name)


class Attention(nn.Module):
    config: DecoderConfig
    lora_dropout: float
    out_init: Callable
    kernel: str
    mesh: Mesh | None

    @nn.compact
    def __call__(self, x, turn: Turn, where: Where, window, cache: Cache | None, keep: bool):
        c = self.config
        B, T, _ = x.shape
        counts = {"q": c.heads, "k": c.kv_heads, "v": c.kv_heads}
        widths = {name: n * c.head_dim for name, n in counts.items()}
        if c.fused:
            (whole,) = fan_out(self, x, {"qkv": sum(widths.values())}, c.qkv_bias)
            parts = jnp.split(whole, np.cumsum(list(widths.values()))[:-1], axis=-1)
        else:
            parts = fan_out(self, x, widths, c.qkv_bias)

        def heads(name: str, y: Array) -> Array:
            normed = bool(c.qk_norm) and name != "v"
            norm = RMSNorm(c.norm_eps, c.norm_from_zero, name=f"{name}_norm") if normed else lambda y: y
            split = lambda y: y.reshape(B, T, counts[name], c.head_dim)
            return split(norm(y)) if c.qk_norm == "all" else norm(split(y))

        q, k, v = (heads(name, y) for name, y in zip(counts, parts, strict=True))
        sinks = self.param("sinks", nn.initializers.zeros, (c.heads,)) if c.sinks else None
        how = {"sinks": sinks, "scale": c.attn_scale, "soft_cap": c.attn_soft_cap}
        q = rotary.rotate(q, *turn.tokens)
        turned = rotary.rotate(k, *turn.tokens)
        if cache is None:
            windows = sorted({w or NO_WINDOW for w in c.windows or [None]})
            out = attend(q, turned, v, where, window, **how, kernel=self.kernel, windows=windows, mesh=self.mesh)
        else:
            keys = cache.k
            if turn.slots is not None:
                keys = jnp.moveaxis(rotary.rotate(jnp.moveaxis(keys, -1, 1), *turn.slots), 1, -1)
            out = recall(q, turned, v, (keys, cache.v), where, window, **how)
        out = Dense(x.shape[-1], c.out_bias, self.lora_dropout, self.out_init, name="o")(out.reshape(B, T, -1))
        return out, (k if turns_late(c) else turned, v) if keep else None


class Block(nn.Module):
    config: DecoderConfig
    lora_dropout: float = 0.0
    mixed: bool = False  # a mixture of experts in the MLP's place
    mesh: Mesh | None = None
    kernel: str = "blocks"  # of attention

    @nn.compact
    def __call__(self, x, turn: Turn, where: Where, window, cache: Cache | None = None, keep: bool = False):
        c = self.config
        # Residual outputs start smaller, so that the sum over layers does not (Radford et al. 2019, section 2.3).
        out_init = nn.initializers.normal(0.02 / (2 * c.layers) ** 0.5)
        norm = lambda name, on: norm_of(c, name) if on else lambda x: x
        add = lambda x, y: x + y if c.residual_scale == 1 else x + c.residual_scale * y
        attn = Attention(c, self.lora_dropout, out_init, self.kernel, self.mesh, name="attn")
        y, kept = attn(norm("attn_norm", c.pre_norm)(x), turn, where, window, cache, keep)
        x = add(x, norm("attn_post_norm", c.post_norm)(y))
        y, routing = norm("mlp_norm", c.pre_norm)(x), None
        if self.mixed and c.moe is not None:
            mixture = Mixture(c.moe, c.activation, self.lora_dropout, out_init, self.mesh, name="moe")
            y, routing = mixture(y, where.segments > 0)
        else:
            make = functools.partial(GatedMLP, fused=c.fused) if c.gated else MLP
            y = make(c.mlp_hidden, c.activation, c.mlp_bias, self.lora_dropout, out_init, name="mlp")(y)
        return add(x, norm("mlp_post_norm", c.post_norm)(y)), kept, routing
