"""The one decoder: blocks of attention and MLP (or a mixture of them), scanned over layers.

Parameters are a nested dict:

    embed/table                 [V, D]
    blocks/0-7/attn/q/kernel    [8, D, N H]    the layers 0 to 7, stacked on the first axis
    norm/scale                  [D]
    head/table                  [V, D]         absent where it is tied to embed/table
    score/kernel                [D, 1]         in the head's place, in a model that scores texts (`reward`)

A key under `blocks` names the layers it stacks; layers of another make, such as those without a mixture of experts,
have a stack of their own. The functions below read the stacks from the tree, so nothing else needs to know where it is
cut (`model.split`).
"""

import functools
import itertools
from collections.abc import Mapping
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int

from jaxsft import narrow
from jaxsft.models import adapter
from jaxsft.models import rope as rotary
from jaxsft.models.attention import NO_WINDOW, SINKS, SOFT_CAPS, WINDOWS, Where, choose, describe
from jaxsft.models.block import Block, DecoderConfig, Turn, norm_of, ropes_of, turns_late
from jaxsft.models.model import Cache, Model, by_rows, span, write
from jaxsft.models.moe import balance
from jaxsft.models.remat import rematerialise
from jaxsft.tree import Tree
from jaxsft.types import Key


def stacks(config: DecoderConfig) -> dict[str, bool]:
    """The stacks that hold the layers, by name, and whether theirs have a mixture of experts.

    Example:
      >>> from jaxsft.models.moe import MoE
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
        "norm": norm_of(config).init(key, x)["params"],
    }
    if config.learned_positions:
        params["embed"]["positions"] = table(jax.random.fold_in(key_embed, 1), config.max_position)
    if config.labels:
        params["score"] = {"kernel": table(key_head, config.labels).T}
    elif not config.tied:
        params["head"] = {"table": table(key_head)}
    return params


def _lengths(where: Where, cached: bool) -> Int[Array, "B T"]:
    """The length of the document each token stands in, as far as it is known; in a cache a row is one document."""
    if cached:
        return jnp.broadcast_to(where.positions.max(axis=1, keepdims=True) + 1, where.positions.shape)
    longest = lambda p, s: jax.ops.segment_max(p, s, num_segments=p.shape[0] + 1)[s] + 1
    return jax.vmap(longest)(where.positions, where.segments)


def shares_prompts(config: object) -> bool:
    """Whether what a model computes of a prompt is the same whatever follows it, so that two answers can read it.

    It is not in an encoder, which sees both sides, nor where a document's length decides how its tokens turn.

    Example:
      >>> make = lambda kind: DecoderConfig(32, 8, 16, 2, 2, 1, 4, max_position=64, rope=rotary.Rope(kind=kind))
      >>> shares_prompts(make("default")), shares_prompts(make("dynamic"))
      (True, False)
    """
    return isinstance(config, DecoderConfig) and not turns_late(config)


def _turns(config: DecoderConfig, where: Where, slots: int | None) -> tuple[Turn, Int[np.ndarray, "L"]]:
    """The turn of each of K different ropes, stacked on a first axis, and which of them each layer has.

    slots: of a cache that the tokens go on from.
    """
    ropes = ropes_of(config)
    kinds = list(dict.fromkeys(ropes))
    late = turns_late(config)
    lengths = _lengths(where, slots is not None) if late else None

    def turn(rope: rotary.Rope) -> Turn:
        inverse, size = rotary.frequencies(rope, config.head_dim), rotary.amplitude(rope)
        if lengths is not None and rope.kind in rotary.BY_LENGTH:
            inverse = rotary.stretched(rope, config.head_dim, lengths)
        tokens = rotary.angles(where.positions, inverse, size)
        if slots is None or not late:
            return Turn(tokens)
        inverse = inverse if isinstance(inverse, np.ndarray) else inverse[:, :1]
        places = jnp.broadcast_to(jnp.arange(slots), (len(where.positions), slots))
        return Turn(tokens, rotary.angles(places, inverse, size))

    stacked = jax.tree.map(lambda *parts: jnp.stack(parts), *[turn(rope) for rope in kinds])
    return stacked, np.array([kinds.index(rope) for rope in ropes], np.int32)


def _needs(config: DecoderConfig) -> set[str]:
    """What a kernel of attention has to be able to do."""
    needs = {
        WINDOWS: any(config.windows or ()),
        SOFT_CAPS: config.attn_soft_cap is not None,
        SINKS: config.sinks,
    }
    return {need for need, is_so in needs.items() if is_so}


def build(
    config: DecoderConfig,
    *,
    dtype: jax.typing.DTypeLike = jnp.float32,
    remat: str = "dots",
    lora_dropout: float = 0.0,
    mesh: Mesh | None = None,
    attention: str = "auto",
) -> Model:
    """Makes the functions of a model.

    Args:
      config: its architecture.
      dtype: of the computation, float32 or bfloat16; softmax, norms and losses are float32 whatever it is.
      remat: what the backward pass computes again: "none": nothing, "dots": all but the results of matrix products and
        attention, "block": all but the inputs of the layers, "offload": likewise, and these wait in the host's memory.
      lora_dropout: rate of the dropout before A, used where `features` gets a dropout key.
      mesh: where it will run, so that activations are cut as the batch is, and experts and tokens meet.
      attention: the kernel, see `attention.choose`.

    Raises:
      ValueError: an unknown remat policy, a kernel that cannot do what the model needs.

    Example:
      >>> config = DecoderConfig(32, 8, 16, 2, heads=2, kv_heads=1, head_dim=4, max_position=64, tied=True)
      >>> model = build(config)
      >>> params = model.init(jax.random.key(0))
      >>> tokens = jnp.arange(6)[None]
      >>> model.features({"params": params}, tokens).shape
      (1, 6, 8)
    """
    again = rematerialise(remat)
    kernel = choose(attention, _needs(config), mesh)
    blocks = {mixed: Block(config, lora_dropout, mixed, mesh, kernel) for mixed in (False, True)}
    final_norm = norm_of(config)
    windows = np.array([w or NO_WINDOW for w in config.windows or [None] * config.layers], np.int32)

    def embed(embedding: Mapping, low: Mapping, tokens: Array, positions: Array, cached: bool) -> Array:
        x = adapter.lookup(embedding["table"], tokens, low, dtype)
        x = x if config.embed_scale == 1 else x * jnp.asarray(config.embed_scale, dtype)
        if not config.learned_positions:
            return x
        # A position that the table does not have is NaN, which training refuses; with a cache it only pads a prompt.
        mode = {"mode": "clip"} if cached else {"mode": "fill", "fill_value": jnp.nan}
        return x + embedding["positions"].at[positions].get(**mode).astype(dtype)

    def run(
        variables: Mapping,
        tokens: Int[Array, "B T"],
        where: Where,
        cache: Cache | None = None,
        keep: bool = False,
        dropout: Key | None = None,
    ):
        params = variables["params"]
        beside = {kind: variables.get(kind, {}).get("blocks", {}) for kind in ("lora", "packed")}
        if astray := set(beside["lora"]) - set(params["blocks"]):
            raise ValueError(
                f"the adapter has stacks {sorted(astray)}, the model {sorted(params['blocks'])}; cut alike"
            )
        low = variables.get("lora", {}).get("embed", {})
        x = by_rows(embed(params["embed"], low, tokens, where.positions, keep), mesh)
        turns, kind_of = _turns(config, where, None if cache is None else cache.k.shape[-1])

        def layer(block: Block, x, inputs):
            weights, window, kind, old, key = inputs
            turn = jax.tree.map(lambda part: part[0] if len(part) == 1 else part[kind], turns)
            rngs = None if key is None else {"dropout": key}
            x, *kept = cast(tuple, block.apply(weights, x, turn, where, window, old, keep, rngs=rngs))
            return x, kept

        heads, routings = [], []
        for name, stack in sorted(params["blocks"].items(), key=lambda item: span(item[0]).start):
            layers = span(name)
            own = slice(layers.start, layers.stop)
            weights = {"params": stack} | {kind: stacks[name] for kind, stacks in beside.items() if name in stacks}
            old = None if cache is None else Cache(cache.k[own], cache.v[own])
            keys = None if dropout is None else jax.random.split(jax.random.fold_in(dropout, layers.start), len(layers))
            step = functools.partial(layer, blocks[config.moe is not None and layers.start not in config.moe.dense])
            x, (new, routing) = narrow.scan(step, x, (weights, windows[own], kind_of[own], old, keys), again)
            heads.append(new)
            routings += [] if routing is None else [routing]
        x = cast(Array, final_norm.apply({"params": params["norm"]}, x))
        last = None if dropout is None else jax.random.fold_in(dropout, config.layers)
        head = variables.get("lora", {}).get("head", {})
        x = adapter.widen(x, head, adapter.dropout(lora_dropout, last))
        join = lambda parts: jax.tree.map(lambda *x: jnp.concatenate(x), *parts)
        return x, join(heads) if keep else None, join(routings) if routings else None

    def learn(variables, tokens, positions=None, segments=None, dropout=None, reads=None):
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        if segments is None:
            segments = jnp.ones_like(tokens)
        x, _, routing = run(variables, tokens, Where(positions, segments, reads), dropout=dropout)
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

    def read(variables, tokens, positions, segments):
        x, new, _ = run(variables, tokens, Where(positions, segments), keep=True)
        k, v = cast(tuple, new)
        return x, Cache(jnp.moveaxis(k, 2, -1), jnp.moveaxis(v, 2, -2))

    def extend(variables, tokens, positions, cache):
        x, new, _ = run(variables, tokens, Where(positions, jnp.ones_like(tokens)), cache, keep=True)
        k, v = cast(tuple, new)
        return x, write(cache, k, v, positions)

    def empty(rows: int, slots: int) -> Cache:
        outer, H = (config.layers, rows, config.kv_heads), config.head_dim
        return Cache(jnp.zeros((*outer, H, slots), dtype), jnp.zeros((*outer, slots, H), dtype))

    said = describe(kernel, mesh)
    return Model(config, functools.partial(_init, config), features, learn, output, read, extend, empty, said, mesh)
