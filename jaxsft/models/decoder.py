"""The one decoder: blocks of attention and MLP (or a mixture of them), scanned over layers.

Parameters are a nested dict:

    embed/table                 [V, D]
    blocks/0-7/attn/q/kernel    [8, D, N H]    the layers 0 to 7, stacked on the first axis
    norm/scale                  [D]
    head/table                  [V, D]         absent where it is tied to embed/table
    score/kernel                [D, 1]         in the head's place, in a model that scores texts (`reward`)

A key under `blocks` names the layers it stacks; layers of another make, such as those without a mixture of experts,
have a stack of their own. `split` cuts a stack in two ("0-5" and "6-7"), and then the two parts
can differ in what trains: the backward pass ends at the first part that trains anything. The functions below read the
cut from the tree, so nothing else needs to know of it.
"""

import functools
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from jaxsft.models import adapter
from jaxsft.models import rope as rotary
from jaxsft.models.attention import NO_WINDOW, Where, attend
from jaxsft.models.layers import ACTIVATIONS, MLP, Dense, GatedMLP, LayerNorm, RMSNorm
from jaxsft.models.moe import Mixture, MoE, balance
from jaxsft.tree import Tree
from jaxsft.types import Key

if TYPE_CHECKING:
    from jaxsft.models.encoder import EncoderConfig

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


class Cache(NamedTuple):
    """Keys and values of what was read so far; slot s of a row holds its token at position s."""

    k: Float[Array, "L B S K H"]
    v: Float[Array, "L B S K H"]


class Model(NamedTuple):
    """A model as pure functions, in the manner of `optax.GradientTransformation`.

    variables is {"params": ..., "lora": ..., "packed": ...}: the second only with an adapter, the third only where
    kernels are packed (`quant`) instead of being parameters. Where an adapter is on the output layer, features and
    table are wider than D by its rank (see `adapter.widen`). `reads` is, for rows of pairs, the segment that each token
    sees beside its own (`types.reads`).
    """

    config: "DecoderConfig | EncoderConfig"
    init: Callable[[Key], Tree]  # key -> params
    features: Callable[..., Float[Array, "B T D"]]  # (variables, tokens, positions, segments, dropout=None, reads=None)
    learn: Callable[..., tuple[Float[Array, "B T D"], Float[Array, ""]]]  # likewise, and `moe.balance`: 0 if dense
    output: Callable[[Mapping], Float[Array, "V D"]]  # variables -> the table that makes logits of features, or raises
    extend: Callable[..., tuple[Float[Array, "B T D"], Cache]]  # (variables, tokens, positions, cache)
    cache: Callable[[int, int], Cache]  # (rows, slots) -> empty


def logits(model: Model, variables: Mapping, features: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
    """Scores of every token, in float32. For training use `losses.logprobs`, which never keeps all of them."""
    table, cap = model.output(variables).astype(features.dtype), model.config.logit_soft_cap
    scores = jnp.einsum("btd,vd->btv", features, table, preferred_element_type=jnp.float32) * model.config.logit_scale
    return scores if cap is None else cap * jnp.tanh(scores / cap)


class Turn(NamedTuple):
    """Cosine and sine of the angles by which queries and keys turn; `slots` where the cache holds keys unturned."""

    tokens: tuple[Float[Array, "B T 1 half"], Float[Array, "B T 1 half"]]
    slots: tuple[Float[Array, "B S 1 half"], Float[Array, "B S 1 half"]] | None = None


def _norm(c: DecoderConfig, name: str | None = None) -> nn.Module:
    return LayerNorm(c.norm_eps, name=name) if c.norm == "layer" else RMSNorm(c.norm_eps, c.norm_from_zero, name=name)


class Attention(nn.Module):
    config: DecoderConfig
    lora_dropout: float
    out_init: Callable

    @nn.compact
    def __call__(self, x, turn: Turn, where: Where, window, cache: Cache | None, slots):
        c = self.config
        B, T, _ = x.shape
        dense = lambda name, n: Dense(n * c.head_dim, c.qkv_bias, self.lora_dropout, name=name)(x)
        counts = {"q": c.heads, "k": c.kv_heads, "v": c.kv_heads}
        if c.fused:
            ends = np.cumsum(list(counts.values()))
            parts = jnp.split(dense("qkv", ends[-1]), ends[:-1] * c.head_dim, axis=-1)
        else:
            parts = [dense(name, n) for name, n in counts.items()]

        def heads(name: str, y: Array) -> Array:
            normed = bool(c.qk_norm) and name != "v"
            norm = RMSNorm(c.norm_eps, c.norm_from_zero, name=f"{name}_norm") if normed else lambda y: y
            split = lambda y: y.reshape(B, T, counts[name], c.head_dim)
            return split(norm(y)) if c.qk_norm == "all" else norm(split(y))

        q, k, v = (heads(name, y) for name, y in zip(counts, parts, strict=True))
        sinks = self.param("sinks", nn.initializers.zeros, (c.heads,)) if c.sinks else None
        how = {"sinks": sinks, "scale": c.attn_scale, "soft_cap": c.attn_soft_cap}
        q = rotary.rotate(q, *turn.tokens)
        k = k if turn.slots else rotary.rotate(k, *turn.tokens)
        if cache is None:
            out = attend(q, k, v, where, where, window, **how, ordered=True)
        else:
            rows = jnp.arange(B)[:, None]
            cache = Cache(cache.k.at[rows, where.positions].set(k), cache.v.at[rows, where.positions].set(v))
            keys = rotary.rotate(cache.k, *turn.slots) if turn.slots else cache.k
            out = attend(q, keys, cache.v, where, slots, window, **how)
        out = Dense(x.shape[-1], c.out_bias, self.lora_dropout, self.out_init, name="o")(out.reshape(B, T, -1))
        return out, cache


class Block(nn.Module):
    config: DecoderConfig
    lora_dropout: float = 0.0
    mixed: bool = False  # a mixture of experts in the MLP's place
    mesh: Mesh | None = None

    @nn.compact
    def __call__(self, x, turn: Turn, where: Where, window, cache: Cache | None = None, slots: Where | None = None):
        c = self.config
        # Residual outputs start smaller, so that the sum over layers does not (Radford et al. 2019, section 2.3).
        out_init = nn.initializers.normal(0.02 / (2 * c.layers) ** 0.5)
        norm = lambda name, on: _norm(c, name) if on else lambda x: x
        add = lambda x, y: x + y if c.residual_scale == 1 else x + c.residual_scale * y
        attn = Attention(c, self.lora_dropout, out_init, name="attn")
        y, cache = attn(norm("attn_norm", c.pre_norm)(x), turn, where, window, cache, slots)
        x = add(x, norm("attn_post_norm", c.post_norm)(y))
        y, routing = norm("mlp_norm", c.pre_norm)(x), None
        if self.mixed and c.moe is not None:
            mixture = Mixture(c.moe, c.activation, self.lora_dropout, out_init, self.mesh, name="moe")
            y, routing = mixture(y, where.segments > 0)
        else:
            make = functools.partial(GatedMLP, fused=c.fused) if c.gated else MLP
            y = make(c.mlp_hidden, c.activation, c.mlp_bias, self.lora_dropout, out_init, name="mlp")(y)
        return add(x, norm("mlp_post_norm", c.post_norm)(y)), cache, routing


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
      params: the parameters, or shapes of them; or another tree of stacks beside them, such as packed kernels.
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


def stacks(config: DecoderConfig) -> dict[str, bool]:
    """The stacks that hold the layers, by name, and whether theirs have a mixture of experts.

    Example:
      >>> config = DecoderConfig(32, 8, 16, 5, 2, 1, 4, 64, moe=MoE(experts=4, active=2, hidden=8, dense=(0,)))
      >>> stacks(config)
      {'0-0': False, '1-4': True}
    """
    dense = range(config.layers) if config.moe is None else config.moe.dense
    runs = [(mixed, list(run)) for mixed, run in itertools.groupby(range(config.layers), lambda i: i not in dense)]
    return {f"{run[0]}-{run[-1]}": mixed for mixed, run in runs}


def _init(config: DecoderConfig, key: Key) -> Tree:
    key_embed, key_head, key_blocks = jax.random.split(key, 3)
    x = jnp.zeros((1, 1, config.hidden))
    where = Where(jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), jnp.int32))
    turn = Turn(rotary.angles(where.positions, rotary.frequencies(config.rope, config.head_dim)))
    keys = jax.random.split(key_blocks, config.layers)
    blocks = {}
    for name, mixed in stacks(config).items():
        block = Block(config, mixed=mixed)
        one = lambda k, block=block: block.init(k, x, turn, where, NO_WINDOW)["params"]
        blocks[name] = jax.vmap(one)(keys[span(name).start : span(name).stop])
    table = lambda k, rows=config.vocab_size: 0.02 * jax.random.normal(k, (rows, config.hidden))
    params = {
        "embed": {"table": table(key_embed)},
        "blocks": blocks,
        "norm": _norm(config).init(key, x)["params"],
    }
    if config.learned_positions:
        params["embed"]["positions"] = table(jax.random.fold_in(key_embed, 1), config.max_position)
    if config.labels:
        params["score"] = {"kernel": table(key_head, config.labels).T}
    elif not config.tied:
        params["head"] = {"table": table(key_head)}
    return params


def by_rows(x: Float[Array, "B T D"], mesh: Mesh | None) -> Float[Array, "B T D"]:
    """Says that activations are cut as the batch is; the cut of the embedding's features would spread otherwise."""
    axes = ("data", "fsdp")
    if mesh is None or mesh.size == 1 or len(x) % math.prod(mesh.shape[axis] for axis in axes):
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(axes, None, None)))


def _lengths(where: Where, cached: bool) -> Int[Array, "B T"]:
    """The length of the document each token stands in, as far as it is known; in a cache a row is one document."""
    if cached:
        return jnp.broadcast_to(where.positions.max(axis=1, keepdims=True) + 1, where.positions.shape)
    longest = lambda p, s: jax.ops.segment_max(p, s, num_segments=p.shape[0] + 1)[s] + 1
    return jax.vmap(longest)(where.positions, where.segments)


def shares_prompts(config: "DecoderConfig | EncoderConfig") -> bool:
    """Whether what a model computes of a prompt is the same whatever follows it, so that two answers can read it.

    It is not in an encoder, which sees both sides, nor where a document's length decides how its tokens turn.

    Example:
      >>> make = lambda kind: DecoderConfig(32, 8, 16, 2, 2, 1, 4, max_position=64, rope=rotary.Rope(kind=kind))
      >>> shares_prompts(make("default")), shares_prompts(make("dynamic"))
      (True, False)
    """
    return isinstance(config, DecoderConfig) and not any(rope.kind in rotary.BY_LENGTH for rope in _ropes(config))


def _ropes(config: DecoderConfig) -> tuple[rotary.Rope, ...]:
    """That of each layer."""
    return config.ropes or (config.rope,) * config.layers


def _turns(config: DecoderConfig, where: Where, slots: Where | None) -> tuple[Turn, Int[np.ndarray, "L"]]:
    """The turn of each of K different ropes, stacked on a first axis, and which of them each layer has."""
    ropes = _ropes(config)
    kinds = list(dict.fromkeys(ropes))
    late = not shares_prompts(config)  # then a key turns anew as its document grows
    lengths = _lengths(where, slots is not None) if late else None

    def turn(rope: rotary.Rope) -> Turn:
        inverse, size = rotary.frequencies(rope, config.head_dim), rotary.amplitude(rope)
        if lengths is not None and rope.kind in rotary.BY_LENGTH:
            inverse = rotary.stretched(rope, config.head_dim, lengths)
        tokens = rotary.angles(where.positions, inverse, size)
        if slots is None or not late:
            return Turn(tokens)
        inverse = inverse if isinstance(inverse, np.ndarray) else inverse[:, :1]
        places = jnp.broadcast_to(slots.positions, (len(where.positions), slots.positions.shape[1]))
        return Turn(tokens, rotary.angles(places, inverse, size))

    stacked = jax.tree.map(lambda *parts: jnp.stack(parts), *[turn(rope) for rope in kinds])
    return stacked, np.array([kinds.index(rope) for rope in ropes], np.int32)


def build(
    config: DecoderConfig,
    *,
    dtype: jax.typing.DTypeLike = jnp.float32,
    remat: str = "none",
    lora_dropout: float = 0.0,
    mesh: Mesh | None = None,
) -> Model:
    """Makes the functions of a model.

    Args:
      config: its architecture.
      dtype: of the computation, float32 or bfloat16; softmax, norms and losses are float32 whatever it is.
      remat: what the backward pass computes again: "none": nothing, "dots": all but the results of matrix products,
        "block": all but the inputs of the layers.
      lora_dropout: rate of the dropout before A, used where `features` gets a dropout key.
      mesh: where it will run, so that activations are cut as the batch is, and experts and tokens meet.

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
    blocks = {mixed: Block(config, lora_dropout, mixed, mesh) for mixed in (False, True)}
    final_norm = _norm(config)
    windows = np.array([w or NO_WINDOW for w in config.windows or [None] * config.layers], np.int32)

    def embed(embedding: Mapping, low: Mapping, tokens: Array, positions: Array, cached: bool) -> Array:
        x = adapter.lookup(embedding["table"], tokens, low, dtype)
        x = x if config.embed_scale == 1 else x * jnp.asarray(config.embed_scale, dtype)
        if not config.learned_positions:
            return x
        # A position that the table does not have is NaN, which training refuses; with a cache it only pads a prompt.
        mode = {"mode": "clip"} if cached else {"mode": "fill", "fill_value": jnp.nan}
        return x + embedding["positions"].at[positions].get(**mode).astype(dtype)

    def run(variables: Mapping, tokens: Int[Array, "B T"], where: Where, cache: Cache | None, dropout: Key | None):
        params = variables["params"]
        beside = {kind: variables.get(kind, {}).get("blocks", {}) for kind in ("lora", "packed")}
        if astray := set(beside["lora"]) - set(params["blocks"]):
            raise ValueError(
                f"the adapter has stacks {sorted(astray)}, the model {sorted(params['blocks'])}; cut alike"
            )
        low = variables.get("lora", {}).get("embed", {})
        x = by_rows(embed(params["embed"], low, tokens, where.positions, cache is not None), mesh)
        slots = None
        if cache is not None:
            S = cache.k.shape[2]
            slots = Where(jnp.arange(S)[None], jnp.ones((1, S), jnp.int32))
        turns, kind_of = _turns(config, where, slots)

        def layer(block: Block, x, inputs):
            weights, window, kind, old, key = inputs
            turn = jax.tree.map(lambda part: part[0] if len(part) == 1 else part[kind], turns)
            rngs = None if key is None else {"dropout": key}
            x, *kept = cast(tuple, block.apply(weights, x, turn, where, window, old, slots, rngs=rngs))
            return x, kept

        caches, routings = [], []
        for name, stack in sorted(params["blocks"].items(), key=lambda item: span(item[0]).start):
            layers = span(name)
            own = slice(layers.start, layers.stop)
            weights = {"params": stack} | {kind: stacks[name] for kind, stacks in beside.items() if name in stacks}
            old = None if cache is None else Cache(cache.k[own], cache.v[own])
            keys = None if dropout is None else jax.random.split(jax.random.fold_in(dropout, layers.start), len(layers))
            step = functools.partial(layer, blocks[config.moe is not None and layers.start not in config.moe.dense])
            step = step if remat == "none" else jax.checkpoint(step, policy=REMAT[remat])
            x, (new, routing) = jax.lax.scan(step, x, (weights, windows[own], kind_of[own], old, keys))
            caches.append(new)
            routings += [] if routing is None else [routing]
        x = cast(Array, final_norm.apply({"params": params["norm"]}, x))
        last = None if dropout is None else jax.random.fold_in(dropout, config.layers)
        head = variables.get("lora", {}).get("head", {})
        x = adapter.widen(x, head, adapter.dropout(lora_dropout, last))
        join = lambda parts: jax.tree.map(lambda *x: jnp.concatenate(x), *parts)
        return x, None if cache is None else join(caches), join(routings) if routings else None

    def learn(variables, tokens, positions=None, segments=None, dropout=None, reads=None):
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        if segments is None:
            segments = jnp.ones_like(tokens)
        x, _, routing = run(variables, tokens, Where(positions, segments, reads), None, dropout)
        return x, jnp.float32(0) if routing is None else balance(routing)

    def features(*args, **more):
        return learn(*args, **more)[0]

    def output(variables):
        if config.labels:
            raise ValueError(
                "this model scores whole texts and has no output layer, so it predicts no tokens; "
                "choose a checkpoint whose config.json names a ...ForCausalLM among its architectures"
            )
        params = variables["params"]
        tied = config.tied and "head" not in params  # an adapter may have parted the two
        return adapter.wide(params["embed" if tied else "head"]["table"], variables.get("lora", {}).get("head", {}))

    def extend(variables, tokens, positions, cache):
        x, cache, _ = run(variables, tokens, Where(positions, jnp.ones_like(tokens)), cache, None)
        return x, cast(Cache, cache)

    def empty(rows: int, slots: int) -> Cache:
        shape = (config.layers, rows, slots, config.kv_heads, config.head_dim)
        return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    return Model(config, functools.partial(_init, config), features, learn, output, extend, empty)
