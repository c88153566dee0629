"""Attention as it is defined, every score at once: what other kernels are checked with; and over a cache."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxsft.models.attention.where import NO_WINDOW, Where, visible


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


def plain(
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
    causal: bool = True,
) -> Float[Array, "B T N H"]:
    """Softmax(q k / sqrt(H)) v over the visible keys; arguments as for `attend`, with queries and keys apart.

    Source: Vaswani et al. 2017, arXiv:1706.03762, eq. 1.
    """
    B, T, N, H = q.shape
    K = k.shape[2]
    grouped = q.reshape(B, T, K, N // K, H)
    scores = jnp.einsum("btkgh,bskh->bkgts", grouped, k, preferred_element_type=jnp.float32)
    seen = visible(query, key, window, causal=causal)
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
    out = jnp.einsum("bkgts,bksh->btkgh", weights[..., :S], values, preferred_element_type=jnp.float32)
    out += jnp.einsum("bkgtu,bukh->btkgh", weights[..., S:], v, preferred_element_type=jnp.float32)
    return out.reshape(B, T, N, H).astype(q.dtype)
