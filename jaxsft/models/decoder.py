"""The one decoder: pre-norm blocks of attention and gated MLP, scanned over layers.

Parameters are a nested dict:

    embed/table                 [V, D]
    blocks/0-7/attn/q/kernel    [8, D, N H]    the layers 0 to 7, stacked on the first axis
    norm/scale                  [D]
    head/table                  [V, D]         absent where it is tied to embed/table

A key under `blocks` names the layers it stacks. `split` cuts a stack in two ("0-5" and "6-7"), and then the two parts
can differ in what trains: the backward pass ends at the first part that trains anything. The functions below read the
cut from the tree, so nothing else needs to know of it.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxsft.models import adapter
from jaxsft.models import rope as rotary
from jaxsft.models.attention import NO_WINDOW, Where, attend
from jaxsft.models.layers import ACTIVATIONS, Dense, GatedMLP, RMSNorm
from jaxsft.tree import Tree
from jaxsft.types import Key

REMAT: dict[str, Callable | None] = {
    "none": jax.checkpoint_policies.everything_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "block": jax.checkpoint_policies.nothing_saveable,
}


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

    def __post_init__(self):
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation {self.activation!r} is not known; known are {', '.join(ACTIVATIONS)}")
        if self.heads % self.kv_heads:
            raise ValueError(
                f"{self.heads} heads cannot share {self.kv_heads} key heads; the one must divide the other"
            )


class Cache(NamedTuple):
    """Keys and values of what was read so far; slot s of a row holds its token at position s."""

    k: Float[Array, "L B S K H"]
    v: Float[Array, "L B S K H"]


class Model(NamedTuple):
    """A model as pure functions, in the manner of `optax.GradientTransformation`.

    variables is {"params": ..., "lora": ...}, the second only with an adapter. Where that adapts the output layer,
    features and table are wider than D by its rank (see `adapter.widen`).
    """

    config: DecoderConfig
    init: Callable[[Key], Tree]  # key -> params
    features: Callable[..., Float[Array, "B T D"]]  # (variables, tokens, positions, segments, dropout=None)
    output: Callable[[Mapping], Float[Array, "V D"]]  # variables -> the table that makes logits of features
    extend: Callable[..., tuple[Float[Array, "B T D"], Cache]]  # (variables, tokens, positions, cache)
    cache: Callable[[int, int], Cache]  # (rows, slots) -> empty


def logits(model: Model, variables: Mapping, features: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
    """Scores of every token, in float32. For training use `losses.logprobs`, which never keeps all of them."""
    table, cap = model.output(variables).astype(features.dtype), model.config.logit_soft_cap
    scores = jnp.einsum("btd,vd->btv", features, table, preferred_element_type=jnp.float32) * model.config.logit_scale
    return scores if cap is None else cap * jnp.tanh(scores / cap)


class Attention(nn.Module):
    config: DecoderConfig
    lora_dropout: float
    out_init: Callable

    @nn.compact
    def __call__(self, x, angles, where: Where, window, cache: Cache | None, slots):
        c = self.config
        B, T, _ = x.shape

        def heads(name: str, n: int) -> Array:
            y = Dense(n * c.head_dim, c.qkv_bias, self.lora_dropout, name=name)(x)
            normed = bool(c.qk_norm) and name != "v"
            norm = RMSNorm(c.norm_eps, c.norm_from_zero, name=f"{name}_norm") if normed else lambda y: y
            split = lambda y: y.reshape(B, T, n, c.head_dim)
            return split(norm(y)) if c.qk_norm == "all" else norm(split(y))

        q, k, v = heads("q", c.heads), heads("k", c.kv_heads), heads("v", c.kv_heads)
        q, k = rotary.rotate(q, *angles), rotary.rotate(k, *angles)
        if cache is None:
            out = attend(q, k, v, where, where, window, scale=c.attn_scale, soft_cap=c.attn_soft_cap, ordered=True)
        else:
            rows = jnp.arange(B)[:, None]
            cache = Cache(cache.k.at[rows, where.positions].set(k), cache.v.at[rows, where.positions].set(v))
            out = attend(q, cache.k, cache.v, where, slots, window, scale=c.attn_scale, soft_cap=c.attn_soft_cap)
        out = Dense(x.shape[-1], c.out_bias, self.lora_dropout, self.out_init, name="o")(out.reshape(B, T, -1))
        return out, cache


class Block(nn.Module):
    config: DecoderConfig
    lora_dropout: float = 0.0

    @nn.compact
    def __call__(self, x, angles, where: Where, window, cache: Cache | None = None, slots: Where | None = None):
        c = self.config
        # Residual outputs start smaller, so that the sum over layers does not (Radford et al. 2019, section 2.3).
        out_init = nn.initializers.normal(0.02 / (2 * c.layers) ** 0.5)
        attn = Attention(c, self.lora_dropout, out_init, name="attn")
        mlp = GatedMLP(c.mlp_hidden, c.activation, c.mlp_bias, self.lora_dropout, out_init, name="mlp")
        norm = lambda name, on: RMSNorm(c.norm_eps, c.norm_from_zero, name=name) if on else lambda x: x
        add = lambda x, y: x + y if c.residual_scale == 1 else x + c.residual_scale * y
        y, cache = attn(norm("attn_norm", c.pre_norm)(x), angles, where, window, cache, slots)
        x = add(x, norm("attn_post_norm", c.post_norm)(y))
        y = mlp(norm("mlp_norm", c.pre_norm)(x))
        return add(x, norm("mlp_post_norm", c.post_norm)(y)), cache


def span(name: str) -> range:
    """The layers that a stack holds, from its name.

    Example:
      >>> span("6-7")
      range(6, 8)
    """
    first, last = name.split("-")
    return range(int(first), int(last) + 1)


def split(params: Tree, at: int) -> Tree:
    """Cuts the stack of layers before layer `at`, so that lower and upper layers can differ in what trains.

    Args:
      params: the parameters, or shapes of them.
      at: the first layer of the upper part.

    Returns:
      params with one more stack; unchanged where a stack already begins there.

    Raises:
      ValueError: no such layer.

    Example:
      >>> list(split({"blocks": {"0-3": {"w": jnp.zeros((4, 2))}}}, 3)["blocks"])
      ['0-2', '3-3']
    """
    stacks = {}
    total = max(span(name).stop for name in params["blocks"])
    if not 0 <= at <= total:
        raise ValueError(f"cannot cut before layer {at}; the model has layers 0 to {total - 1}")
    for name, stack in params["blocks"].items():
        layers = span(name)
        if layers.start < at < layers.stop:
            cut = at - layers.start
            stacks[f"{layers.start}-{at - 1}"] = jax.tree.map(lambda x, cut=cut: x[:cut], stack)
            stacks[f"{at}-{layers.stop - 1}"] = jax.tree.map(lambda x, cut=cut: x[cut:], stack)
        else:
            stacks[name] = stack
    return {**params, "blocks": stacks}


def _init(config: DecoderConfig, key: Key) -> Tree:
    key_embed, key_head, key_blocks = jax.random.split(key, 3)
    block, x = Block(config), jnp.zeros((1, 1, config.hidden))
    where = Where(jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), jnp.int32))
    angles = rotary.angles(where.positions, rotary.frequencies(config.rope, config.head_dim))
    one = lambda k: block.init(k, x, angles, where, NO_WINDOW)["params"]
    table = lambda k: {"table": 0.02 * jax.random.normal(k, (config.vocab_size, config.hidden))}
    params = {
        "embed": table(key_embed),
        "blocks": {f"0-{config.layers - 1}": jax.vmap(one)(jax.random.split(key_blocks, config.layers))},
        "norm": {"scale": (jnp.zeros if config.norm_from_zero else jnp.ones)(config.hidden)},
    }
    return params if config.tied else {**params, "head": table(key_head)}


def _turns(config: DecoderConfig, positions: Int[Array, "B T"]) -> tuple[Array, Array, Int[np.ndarray, "L"]]:
    """Cosine and sine of the positions, [K, B, T, 1, half] for K different ropes, and which of them each layer has."""
    ropes = config.ropes or (config.rope,) * config.layers
    kinds = list(dict.fromkeys(ropes))
    inverse = [rotary.frequencies(rope, config.head_dim) for rope in kinds]
    turns = [rotary.angles(positions, f, rotary.amplitude(rope)) for f, rope in zip(inverse, kinds, strict=True)]
    cos, sin = (jnp.stack(parts) for parts in zip(*turns, strict=True))
    return cos, sin, np.array([kinds.index(rope) for rope in ropes], np.int32)


def build(
    config: DecoderConfig, *, dtype: jax.typing.DTypeLike = jnp.float32, remat: str = "none", lora_dropout: float = 0.0
) -> Model:
    """Makes the functions of a model.

    Args:
      config: its architecture.
      dtype: of the computation, float32 or bfloat16; softmax, norms and losses are float32 whatever it is.
      remat: what the backward pass computes again: "none": nothing, "dots": all but the results of matrix products,
        "block": all but the inputs of the layers.
      lora_dropout: rate of the dropout before A, used where `features` gets a dropout key.

    Raises:
      ValueError: an unknown remat policy.

    Example:
      >>> config = DecoderConfig(32, 8, 16, 2, heads=2, kv_heads=1, head_dim=4, max_position=64, tied=True)
      >>> model = build(config)
      >>> params = model.init(jax.random.key(0))
      >>> tokens = jnp.arange(6)[None]
      >>> model.features({"params": params}, tokens).shape
      (1, 6, 8)
    """
    if remat not in REMAT:
        raise ValueError(f"remat policy {remat!r} is not known; known are {', '.join(REMAT)}")
    block = Block(config, lora_dropout)
    final_norm = RMSNorm(config.norm_eps, config.norm_from_zero)
    windows = np.array([w or NO_WINDOW for w in config.windows or [None] * config.layers], np.int32)

    def run(variables: Mapping, tokens: Int[Array, "B T"], where: Where, cache: Cache | None, dropout: Key | None):
        params, low = variables["params"], variables.get("lora", {})
        lora = low.get("blocks", {})
        if astray := set(lora) - set(params["blocks"]):
            raise ValueError(
                f"the adapter has stacks {sorted(astray)}, the model {sorted(params['blocks'])}; cut alike"
            )
        x = adapter.lookup(params["embed"]["table"], tokens, low.get("embed", {}), dtype)
        x = x if config.embed_scale == 1 else x * jnp.asarray(config.embed_scale, dtype)
        cos, sin, kind_of = _turns(config, where.positions)
        slots = None
        if cache is not None:
            S = cache.k.shape[2]
            slots = Where(jnp.arange(S)[None], jnp.ones((1, S), jnp.int32))

        def layer(x, inputs):
            weights, window, kind, old, key = inputs
            angles = (cos[0], sin[0]) if len(cos) == 1 else (cos[kind], sin[kind])
            rngs = None if key is None else {"dropout": key}
            return block.apply(weights, x, angles, where, window, old, slots, rngs=rngs)

        if remat != "none":
            layer = jax.checkpoint(layer, policy=REMAT[remat])
        caches = []
        for name, stack in sorted(params["blocks"].items(), key=lambda item: span(item[0]).start):
            layers = span(name)
            weights = {"params": stack, "lora": lora[name]} if name in lora else {"params": stack}
            old = (
                None
                if cache is None
                else Cache(cache.k[layers.start : layers.stop], cache.v[layers.start : layers.stop])
            )
            keys = None if dropout is None else jax.random.split(jax.random.fold_in(dropout, layers.start), len(layers))
            own = slice(layers.start, layers.stop)
            x, new = jax.lax.scan(layer, x, (weights, windows[own], kind_of[own], old, keys))
            caches.append(new)
        x = cast(Array, final_norm.apply({"params": params["norm"]}, x))
        last = None if dropout is None else jax.random.fold_in(dropout, config.layers)
        x = adapter.widen(x, low.get("head", {}), adapter.dropout(lora_dropout, last))
        if cache is not None:
            cache = Cache(*(jnp.concatenate(parts) for parts in zip(*caches, strict=True)))
        return x, cache

    def features(variables, tokens, positions=None, segments=None, dropout=None):
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        if segments is None:
            segments = jnp.ones_like(tokens)
        return run(variables, tokens, Where(positions, segments), None, dropout)[0]

    def output(variables):
        params = variables["params"]
        tied = config.tied and "head" not in params  # an adapter may have parted the two
        return adapter.wide(params["embed" if tied else "head"]["table"], variables.get("lora", {}).get("head", {}))

    def extend(variables, tokens, positions, cache):
        x, cache = run(variables, tokens, Where(positions, jnp.ones_like(tokens)), cache, None)
        return x, cast(Cache, cache)

    def empty(rows: int, slots: int) -> Cache:
        shape = (config.layers, rows, slots, config.kv_heads, config.head_dim)
        return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    return Model(config, functools.partial(_init, config), features, output, extend, empty)
