"""Attention in blocks, in plain XLA: what a CPU is fastest with, and what every backend can do.

Queries and keys are cut into tiles, and queries meet a tile of keys at a time with a softmax that is corrected as it
goes (Dao et al. 2022, arXiv:2205.14135, algorithm 1). So no [T, T] score is ever kept, a tile's scores stay in a CPU's
cache, and a query tile begins at the first key tile that one of its queries can see and ends at the last: a causal row
costs half its square, packed documents and sliding windows cost their own length. The backward pass has the same tiles
and computes their scores again, from the logarithm of the softmax's sum (algorithm 4).

Where each row is cut over devices, keys and values go round them in a ring (Liu et al. 2023, arXiv:2310.01889), in the
backward pass with their gradients; whole pieces that lie behind the queries are no tile of theirs.

    row of tiles       keys 0 1 2 3
    documents a a b b
    queries 0               x . . .
    queries 1               x x . .
    queries 2               . . x .      begins at 2: documents are met by the segments in a tile, not token by token
    queries 3               . . x x
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxsft.models.attention.where import NO_WINDOW, Where, pad, visible
from jaxsft.models.remat import dear

TILES = {"cpu": 64}  # tokens; keeps scores in a CPU's cache
TILE = 512  # elsewhere: there a step of a loop costs more
LOWEST = float(jnp.finfo(jnp.float32).min)


class How(NamedTuple):
    """What does not change from step to step: of the scores, and of the ring of devices that the keys go round."""

    scale: float
    soft_cap: float | None
    causal: bool
    tile: int
    ring: tuple[str, int] | None = None  # the axis, and its length


class Sums(NamedTuple):
    """Of each query: the weighted sum of values, the largest score yet, and the sum of weights relative to it."""

    out: Float[Array, "n B K G t H"]
    top: Float[Array, "n B K G t 1"]
    total: Float[Array, "n B K G t 1"]


Keys = tuple[Float[Array, "n B K t H"], Float[Array, "n B K t H"], Where]  # keys, values and where they stand


def _tiles(x: Array, axis: int, tile: int) -> Array:
    """Cuts an axis into tiles, which come first."""
    return jnp.moveaxis(x.reshape(*x.shape[:axis], -1, tile, *x.shape[axis + 1 :]), axis, 0)


def _queries(x: Float[Array, "B T N H"], heads: int, tile: int) -> Float[Array, "n B K G t H"]:
    B, T, N, H = x.shape
    return _tiles(x.reshape(B, T, heads, N // heads, H).transpose(0, 2, 3, 1, 4), 3, tile)


def _keys(x: Float[Array, "B T K H"], tile: int) -> Float[Array, "n B K t H"]:
    return _tiles(x.swapaxes(1, 2), 2, tile)


def _tokens(x: Float[Array, "n B K *G t H"]) -> Float[Array, "B T N H"]:
    """The inverse of `_queries` and of `_keys`."""
    n, B, t, H = *x.shape[:2], *x.shape[-2:]
    return jnp.moveaxis(x.reshape(n, B, -1, t, H), 2, 3).swapaxes(0, 1).reshape(B, n * t, -1, H)


def _met(how: How, query: Where, key: Where, offset, window) -> tuple[Int[Array, "n"], Int[Array, "n"]]:
    """The key tiles that each query tile goes through: from the first in which a query of any row may see a key.

    Segments grow along a row, and padding ends it, so what a tile has of them lies between the first and the last.

    Args:
      query, key: in tiles, [n, B, t].
      offset: how many tokens further right than the keys the queries stand.
    """
    last = lambda segments: jnp.where(segments > 0, segments, (1 << 30) - segments)
    ends = lambda x: (x.min(axis=-1), x.max(axis=-1))
    first, final = ends(last(query.segments))
    if query.reads is not None:
        also = ends(last(query.reads))
        first, final = jnp.minimum(first, also[0]), jnp.maximum(final, also[1])
    near, far = ends(last(key.segments))
    seen = (far >= first[:, None]) & (near <= final[:, None])
    n, _, t = query.segments.shape
    m = len(key.segments)
    if how.causal:
        (low, high), (start, stop) = ends(query.positions), ends(key.positions)
        seen &= (high[:, None] >= start) & (low[:, None] - stop < window)
        # No query needs a key further right, but padding would see the padding there.
        seen &= ((jnp.arange(n) * t + t - 1 + offset)[:, None] >= jnp.arange(m) * t)[..., None]
    seen = seen.any(axis=-1)
    return jnp.argmax(seen, axis=1), jnp.where(seen.any(axis=1), m - jnp.argmax(seen[:, ::-1], axis=1), 0)


def _scores(how: How, q, k, query: Where, key: Where, window) -> Float[Array, "B K G t s"]:
    """Of a tile of queries and one of keys, in float32; the lowest number where a query does not see a key."""
    scores = jnp.einsum("bkgth,bksh->bkgts", q, k, preferred_element_type=jnp.float32) * how.scale
    scores = scores if how.soft_cap is None else how.soft_cap * jnp.tanh(scores / how.soft_cap)
    return jnp.where(visible(query, key, window, causal=how.causal)[:, None, None], scores, LOWEST)


def _at(tiles: Any, i) -> Any:
    return jax.tree.map(lambda x: x[i], tiles)


def _add(how: How, q, query: Where, window, sums: Sums, keys: Keys, offset) -> tuple[Sums, Keys]:
    """Adds what queries see among some keys."""
    k, v, key = keys
    begin, end = _met(how, query, key, offset, window)

    def tile(_, row):
        i, q, sums = row
        here = _at(query, i)

        def meet(j, sums: Sums) -> Sums:
            scores = _scores(how, q, k[j], here, _at(key, j), window)
            top = jnp.maximum(sums.top, scores.max(axis=-1, keepdims=True))
            weights, kept = jnp.exp(scores - top), jnp.exp(sums.top - top)
            value = jnp.einsum("bkgts,bksh->bkgth", weights.astype(v.dtype), v[j], preferred_element_type=jnp.float32)
            return Sums(sums.out * kept + value, top, sums.total * kept + weights.sum(axis=-1, keepdims=True))

        return None, jax.lax.fori_loop(begin[i], end[i], meet, sums)

    return jax.lax.scan(tile, None, (jnp.arange(len(q)), q, sums))[1], keys


def _pull(how: How, q, query: Where, window, out, dq, keys, offset):
    """The gradients that queries and some keys give each other: the queries', and keys with theirs added."""
    (k, v, key), dk, dv = keys
    begin, end = _met(how, query, key, offset, window)

    def tile(grads, row):
        i, q, (log_total, delta, dout), dq = row
        here = _at(query, i)

        def meet(j, grads):
            dq, dk, dv = grads
            scores = _scores(how, q, k[j], here, _at(key, j), window)
            weights = jnp.exp(scores - log_total)
            dv = dv.at[j].add(
                jnp.einsum("bkgts,bkgth->bksh", weights.astype(v.dtype), dout, preferred_element_type=jnp.float32)
            )
            dweights = jnp.einsum("bkgth,bksh->bkgts", dout, v[j], preferred_element_type=jnp.float32)
            dscores = weights * (dweights - delta)
            if how.soft_cap is not None:
                # Of what is not seen the weight is 0, but the score beyond all bounds.
                dscores = jnp.where(weights > 0, dscores * (1 - jnp.square(scores / how.soft_cap)), 0)
            dscores = dscores.astype(q.dtype)
            dk = dk.at[j].add(jnp.einsum("bkgts,bkgth->bksh", dscores, q, preferred_element_type=jnp.float32))
            dq += jnp.einsum("bkgts,bksh->bkgth", dscores, k[j], preferred_element_type=jnp.float32)
            return dq, dk, dv

        dq, *grads = jax.lax.fori_loop(begin[i], end[i], meet, (dq, *grads))
        return tuple(grads), dq

    (dk, dv), dq = jax.lax.scan(tile, (dk, dv), (jnp.arange(len(q)), q, out, dq))
    return dq, ((k, v, key), dk, dv)


def _round(how: How, step: Callable, state: Any, keys: Any, length: int) -> tuple[Any, Any]:
    """Has the queries meet the keys of each device: their own, then those that the devices before them hand on.

    Args:
      step: (state, keys, offset) -> (state, keys).
      length: how many tokens of a row a device has.
    """
    state, keys = step(state, keys, 0)
    if how.ring is None:
        return state, keys
    axis, devices = how.ring
    here = jax.lax.axis_index(axis)

    def turn(n, met):
        state, keys = met
        return step(state, _hand_on(axis, devices, keys), length * (here - (here - n) % devices))

    return jax.lax.fori_loop(1, devices, turn, (state, keys))


def _hand_on(axis: str, devices: int, keys: Any) -> Any:
    to = [(i, (i + 1) % devices) for i in range(devices)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, axis, to), keys)


def _forward(how: How, q, k, v, sinks, where: Where, window):
    query = jax.tree.map(lambda x: _tiles(x, 1, how.tile), where)
    heads = k.shape[2]
    cut = _queries(q, heads, how.tile)
    one = (*cut.shape[:-1], 1)
    empty = Sums(jnp.zeros(cut.shape, jnp.float32), jnp.full(one, LOWEST), jnp.zeros(one))
    add = functools.partial(_add, how, cut, query, window)
    keys = (_keys(k, how.tile), _keys(v, how.tile), query._replace(reads=None))
    (out, top, total), _ = _round(how, add, empty, keys, q.shape[1])
    if sinks is not None:  # a score that every query sees besides, of a key without a value
        sink = sinks.astype(jnp.float32).reshape(heads, -1, 1, 1)
        kept = jnp.exp(top - jnp.maximum(top, sink))
        top = jnp.maximum(top, sink)
        out, total = out * kept, total * kept + jnp.exp(sink - top)
    out, log_total = dear(_tokens(out / total).astype(q.dtype)), dear(top + jnp.log(total))
    return out, (q, k, v, sinks, where, window, out, log_total)


def _backward(how: How, kept, dout):
    q, k, v, sinks, where, window, out, log_total = kept
    query = jax.tree.map(lambda x: _tiles(x, 1, how.tile), where)
    heads = k.shape[2]
    cut, dout_cut = (_queries(x, heads, how.tile) for x in (q, dout))
    delta = (out.astype(jnp.float32) * dout).sum(axis=-1, keepdims=True)
    delta = _queries(delta, heads, how.tile)
    pull = functools.partial(_pull, how, cut, query, window, (log_total, delta, dout_cut))
    keys = (_keys(k, how.tile), _keys(v, how.tile), query._replace(reads=None))
    none = jnp.zeros(keys[0].shape, jnp.float32)
    dq, (_, *dkv) = _round(how, pull, jnp.zeros(cut.shape, jnp.float32), (keys, none, none), q.shape[1])
    dk, dv = dkv if how.ring is None else _hand_on(*how.ring, dkv)  # the last step home
    dsinks = None
    if sinks is not None:
        weights = jnp.exp(sinks.astype(jnp.float32).reshape(heads, -1, 1, 1) - log_total)
        dsinks = -(weights * delta).sum(axis=(0, 1, 4, 5)).reshape(sinks.shape).astype(sinks.dtype)
    dq, dk = (_tokens(x) * how.scale for x in (dq, dk))
    return dq.astype(q.dtype), dk.astype(k.dtype), _tokens(dv).astype(v.dtype), dsinks, None, None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(how: How, q, k, v, sinks, where: Where, window):
    return _forward(how, q, k, v, sinks, where, window)[0]


_attention.defvjp(_forward, _backward)


def blocks(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    where: Where,
    window: Int[Array, ""] | int = NO_WINDOW,
    *,
    sinks: Float[Array, "N"] | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    causal: bool = True,
    tile: int | None = None,
    ring: tuple[str, int] | None = None,
) -> Float[Array, "B T N H"]:
    """What `plain` gives for training rows, in which no causal token needs a key further right.

    Padding sees some of the padding, which nobody reads.

    Args:
      q, k, v, where, window, sinks, scale, soft_cap, causal: see `attend`.
      tile: tokens of a tile, at most; by default as `TILES` has it.
      ring: inside `jax.shard_map`, the axis of the mesh over whose devices each row is cut, and how many these are;
        then this device's queries meet the keys of all (Liu et al. 2023, arXiv:2310.01889).

    Example:
      >>> where = Where(jnp.array([[0, 1, 0, 1]]), jnp.array([[1, 1, 2, 2]]))
      >>> values = jnp.arange(4.0).reshape(1, 4, 1, 1)
      >>> blocks(jnp.zeros((1, 4, 1, 1)), jnp.zeros((1, 4, 1, 1)), values, where)[0, :, 0, 0]
      Array([0. , 0.5, 2. , 2.5], dtype=float32)
    """
    T, H = q.shape[1], q.shape[-1]
    most = tile or TILES.get(jax.default_backend(), TILE)
    tile = -(-T // -(-T // most))  # as even as can be, so that little is padded
    how = How(1 / math.sqrt(H) if scale is None else scale, soft_cap, causal, tile, ring)
    q, k, v, where = pad(tile, q, k, v, where)
    return cast(Array, _attention(how, q, k, v, sinks, where, window))[:, :T]
