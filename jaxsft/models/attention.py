"""Grouped-query attention over packed rows and over a cache.

One rule decides who sees whom, for training, prefill and decoding alike: same segment, not later, within the window;
in an encoder the same segment alone. Queries go in blocks, and a causal block meets only the keys up to its own end:
half the products of the square, and no [T, T] score is kept for the backward pass, which computes a block's again.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

NO_WINDOW = 1 << 30  # positions a token looks back where there is no sliding window
BLOCK = 128  # queries; keeps a block's scores in a CPU's cache
MOST_BLOCKS = 16  # bounds the unrolled program for long rows


class Where(NamedTuple):
    """Where tokens stand: position inside the document, and which document of the row (0: none, padding)."""

    positions: Int[Array, "B T"]
    segments: Int[Array, "B T"]
    reads: Int[Array, "B T"] | None = None  # a segment that queries see beside their own, see `types.Pairs`


def visible(
    query: Where, key: Where, window: Int[Array, ""] | int = NO_WINDOW, *, causal: bool = True
) -> Bool[Array, "B T S"]:
    """Which keys each query attends to: its own document's, up to itself, at most `window` positions back.

    Where it is not causal: all of its own document's, before and behind it, whatever the window. A query that `reads`
    another segment sees its keys by the same rule, so that a prompt may go on in two ways.

    Two documents and one padding token in a row, `x` for visible:

        segments   1 1 2 2 0
        token 0    x . . . .
        token 1    x x . . .
        token 2    . . x . .
        token 3    . . x x .
        token 4    . . . . x     padding sees padding, so that no softmax is empty

    A prompt of two tokens, and two answers that both read it:

        positions  0 1 2 3 2
        segments   1 1 2 2 3
        reads      1 1 1 1 1
        token 0    x . . . .
        token 1    x x . . .
        token 2    x x x . .
        token 3    x x x x .
        token 4    x x . . x

    Example:
      >>> where = Where(jnp.array([[0, 1, 0, 1, 0]]), jnp.array([[1, 1, 2, 2, 0]]))
      >>> visible(where, where)[0].astype(int).tolist()
      [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 1]]
    """
    same = query.segments[:, :, None] == key.segments[:, None, :]
    if query.reads is not None:
        same |= query.reads[:, :, None] == key.segments[:, None, :]
    if not causal:
        return same
    distance = query.positions[:, :, None] - key.positions[:, None, :]
    return same & (distance >= 0) & (distance < window)


def _weights(
    scores: Float[Array, "B K G T S"],
    seen: Bool[Array, "B T S"],
    scale: float,
    sinks: Float[Array, "N"] | None,
    soft_cap: float | None,
) -> Float[Array, "B K G T S"]:
    """Softmax over the keys that are seen, in float32."""
    scores = scores * scale
    scores = scores if soft_cap is None else soft_cap * jnp.tanh(scores / soft_cap)
    scores = jnp.where(seen[:, None, None], scores, jnp.finfo(jnp.float32).min)
    if sinks is None:
        return jax.nn.softmax(scores, axis=-1)
    # A score that every query sees besides, of a key without a value.
    _, K, G, _, S = scores.shape
    sink = jnp.broadcast_to(sinks.astype(jnp.float32).reshape(K, G, 1, 1), (*scores.shape[:-1], 1))
    return jax.nn.softmax(jnp.concatenate([scores, sink], axis=-1), axis=-1)[..., :S]


def _block(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    seen: Bool[Array, "B T S"],
    scale: float | None,
    sinks: Float[Array, "N"] | None,
    soft_cap: float | None,
) -> Float[Array, "B T N H"]:
    B, T, N, H = q.shape
    K = k.shape[2]
    grouped = q.reshape(B, T, K, N // K, H)
    scores = jnp.einsum("btkgh,bskh->bkgts", grouped, k, preferred_element_type=jnp.float32)
    weights = _weights(scores, seen, 1 / math.sqrt(H) if scale is None else scale, sinks, soft_cap).astype(v.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", weights, v).reshape(B, T, N, H)


def recall(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    before: tuple[Float[Array, "B K H S"], Float[Array, "B K S H"]],
    where: Where,
    window: Int[Array, ""] | int = NO_WINDOW,
    *,
    sinks: Float[Array, "N"] | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
) -> Float[Array, "B T N H"]:
    """What `attend` gives for tokens that go on where others were read: over those, in a cache, and over themselves.

    The cache is only read, so that a loop over tokens need not copy it; of its slots those below a row's first new
    position count.

    Args:
      q, k, v: heads of the new tokens, q and k rotated.
      before: keys and values of one layer's cache, see `model.Cache`.
      where: where the new tokens stand; their positions follow each other.
      window, sinks, scale, soft_cap: see `attend`.
    """
    B, T, N, H = q.shape
    (keys, values), K = before, k.shape[2]
    S = keys.shape[-1]
    grouped = q.reshape(B, T, K, N // K, H)
    old = jnp.einsum("btkgh,bkhs->bkgts", grouped, keys, preferred_element_type=jnp.float32)
    own = jnp.einsum("btkgh,bukh->bkgtu", grouped, k, preferred_element_type=jnp.float32)
    slots = Where(jnp.arange(S)[None], jnp.ones((1, S), jnp.int32))
    there = visible(where, slots, window) & (slots.positions < where.positions[:, :1])[:, None]
    seen = jnp.concatenate([there, visible(where, where, window)], axis=-1)
    scale = 1 / math.sqrt(H) if scale is None else scale
    weights = _weights(jnp.concatenate([old, own], axis=-1), seen, scale, sinks, soft_cap).astype(v.dtype)
    out = jnp.einsum("bkgts,bksh->btkgh", weights[..., :S], values)
    return (out + jnp.einsum("bkgtu,bukh->btkgh", weights[..., S:], v)).reshape(B, T, N, H)


def _cut(where: Where, at: slice) -> Where:
    return jax.tree.map(lambda x: x[:, at], where)


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    query: Where,
    key: Where,
    window: Int[Array, ""] | int = NO_WINDOW,
    *,
    sinks: Float[Array, "N"] | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    ordered: bool = False,
    causal: bool = True,
) -> Float[Array, "B T N H"]:
    """Softmax(q k / sqrt(H)) v over the visible keys; N query heads share K key heads in groups of N / K.

    Args:
      q, k, v: heads, q and k rotated; softmax in float32 whatever their dtype.
      query, key: where the queries and keys stand.
      window: how many positions back a token sees, itself included.
      sinks: of each head, a score beside those of the keys that takes weight and gives nothing (Xiao et al. 2023,
        arXiv:2309.17453, section 3.3; gpt-oss).
      scale: of the scores, in 1 / sqrt(H)'s place.
      soft_cap: bounds the scores, cap tanh(score / cap) (Gemma 2, arXiv:2408.00118, section 2).
      ordered: T = S and tokens stand as in training rows, where no causal query needs a key further right (a segment
        that is read lies left of who reads it): queries go in blocks, and work is skipped.
      causal: a token sees nothing behind it; otherwise its whole document, as in an encoder.

    Source: Vaswani et al. 2017, arXiv:1706.03762, eq. 1; groups: Ainslie et al. 2023, arXiv:2305.13245.
    """
    T = q.shape[1]
    if not ordered:
        return _block(q, k, v, visible(query, key, window, causal=causal), scale, sinks, soft_cap)
    block = max(BLOCK, -(-T // MOST_BLOCKS))
    again = jax.checkpoint(functools.partial(_block, scale=scale, sinks=sinks, soft_cap=soft_cap))
    out = []
    for start in range(0, T, block):
        rows, upto = slice(start, start + block), slice(0, start + block if causal else T)
        seen = visible(_cut(query, rows), _cut(key, upto), window, causal=causal)
        out.append(again(q[:, rows], k[:, upto], v[:, upto], seen))
    return jnp.concatenate(out, axis=1)
