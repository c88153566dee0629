"""One vector for a text, from the features of its tokens.

    mode                     over the real tokens x_1 ... x_n
    mean                     their sum / n
    mean_sqrt_len_tokens     their sum / sqrt(n)
    weightedmean             sum of i x_i / sum of i: what a decoder has read more of counts more (arXiv:2202.08904)
    max                      the largest of each feature
    cls, lasttoken           x_1, x_n

In float32 whatever the features are; padding may lie on either side. The names are those of sentence-transformers
(Reimers and Gurevych 2019, arXiv:1908.10084, section 3).
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

POOLINGS = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")


def pool(
    features: Float[Array, "B T D"],
    real: Bool[Array, "B T"],
    modes: Sequence[str] = ("mean",),
    skip: Int[Array, ""] | int = 0,
) -> Float[Array, "B E"]:
    """Pools each row's real tokens to one vector; of several modes the vectors stand one behind the other.

    Args:
      features: of the last layer.
      real: False where a row is padding. One text a row.
      modes: of `POOLINGS`.
      skip: real tokens at each text's start that are not counted, those of a prompt.

    Returns:
      float32; zeros for a row without a token to count.

    Raises:
      ValueError: an unknown mode.

    Example:
      >>> features = jnp.array([[[1.0, 4.0], [3.0, 0.0], [9.0, 9.0]]])
      >>> pool(features, jnp.array([[True, True, False]]), ["mean", "lasttoken"]).tolist()
      [[2.0, 2.0, 3.0, 0.0]]
    """
    if unknown := sorted(set(modes) - set(POOLINGS)):
        raise ValueError(f"pooling {unknown[0]!r} is not known; known are {', '.join(POOLINGS)}")
    place = jnp.cumsum(real, axis=1)  # 1 at a text's first token
    counted = real & (place > skip)
    x = jnp.where(counted[..., None], features.astype(jnp.float32), 0)  # padding may hold anything, NaN too
    return jnp.concatenate([_pool(mode, x, counted, place) for mode in modes], axis=-1)


def _pool(mode: str, x: Float[Array, "B T D"], counted: Bool[Array, "B T"], place: Int[Array, "B T"]) -> Array:
    n = jnp.maximum(counted.sum(axis=1, keepdims=True), 1).astype(jnp.float32)
    some = counted.any(axis=1, keepdims=True)
    if mode == "max":
        return jnp.where(some, jnp.where(counted[..., None], x, -jnp.inf).max(axis=1), 0)
    if mode == "cls":
        return _at(x, jnp.argmax(counted, axis=1))
    if mode == "lasttoken":
        return _at(x, x.shape[1] - 1 - jnp.argmax(counted[:, ::-1], axis=1))
    if mode == "weightedmean":
        weights = jnp.where(counted, place, 0).astype(jnp.float32)
        return (x * weights[..., None]).sum(axis=1) / jnp.maximum(weights.sum(axis=1, keepdims=True), 1)
    return x.sum(axis=1) / (jnp.sqrt(n) if mode == "mean_sqrt_len_tokens" else n)


def _at(x: Float[Array, "B T D"], index: Int[Array, "B"]) -> Float[Array, "B D"]:
    return jnp.take_along_axis(x, index[:, None, None], axis=1)[:, 0]


def unit(x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """The vectors at length 1, in float32; a vector of zeros stays one.

    Example:
      >>> unit(jnp.array([[0.0, 4.0], [0.0, 0.0]])).tolist()
      [[0.0, 1.0], [0.0, 0.0]]
    """
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum((x * x).sum(axis=-1, keepdims=True), 1e-24))
