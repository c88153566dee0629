"""Chunks of tokens that meet the output table one after the other, so that not all scores exist at once.

Rows are first compacted so that the tokens that count come first; chunks that hold none are skipped.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

CHUNK_CPU, CHUNK = 256, 4096  # tokens whose logits exist at one time; a CPU's cache likes few


class Head(NamedTuple):
    """What makes scores of the products of features and table, and how many tokens meet the table at one time."""

    width: int  # tokens of each row
    scale: float = 1.0
    soft_cap: float | None = None
    temperature: float = 1.0


class Compact(NamedTuple):
    """How rows are reordered so that the tokens that count come first, and filled up to whole chunks."""

    order: Int[Array, "B Tc"]  # where each token stood
    back: Int[Array, "B T"]  # where each token went
    counts: Bool[Array, "B Tc"]  # true for a prefix of each row
    width: int  # tokens of each row in a chunk


def compact(mask: Bool[Array, "B T"], chunk: int | None) -> Compact:
    """The order for `mask`, in chunks of `chunk` tokens, or of what suits the backend."""
    B, T = mask.shape
    chunk = chunk or (CHUNK_CPU if jax.default_backend() == "cpu" else CHUNK)
    width = min(T, max(1, chunk // B))
    order = jnp.argsort(~mask, axis=1, stable=True)
    back = jnp.argsort(order, axis=1)
    order = jnp.pad(order, ((0, 0), (0, -T % width)), mode="edge")
    return Compact(order, back, jnp.arange(order.shape[1]) < mask.sum(axis=1, keepdims=True), width)


def scores(features: Float[Array, "B t D"], table: Float[Array, "V D"], head: Head) -> tuple[Array, Array | float]:
    """Scores of every token of the vocabulary, float32 [B, t, V], and d scores / d products of features and table."""
    logits = jnp.einsum("btd,vd->btv", features, table.astype(features.dtype), preferred_element_type=jnp.float32)
    slope = head.scale / head.temperature
    if head.scale != 1:
        logits = logits * head.scale
    if head.soft_cap is not None:
        bent = jnp.tanh(logits / head.soft_cap)
        logits, slope = head.soft_cap * bent, slope * (1 - bent * bent)
    if head.temperature != 1:
        logits = logits / head.temperature
    return logits, slope


def chunks(step: Any, carry: Any, mask: Bool[Array, "B Tc"], width: int) -> tuple[Any, Any]:
    """Scans `step(carry, take)` over chunks of tokens, skipping those that hold no token that counts."""

    def body(carry, start):
        take: Any = lambda x: jax.lax.dynamic_slice_in_dim(x, start, width, axis=1)
        skip = lambda carry: (carry, jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shape))
        run = lambda carry: step(carry, take)
        shape = jax.eval_shape(run, carry)[1]
        return jax.lax.cond(take(mask).any(), run, skip, carry)

    carry, out = jax.lax.scan(body, carry, jnp.arange(0, mask.shape[1], width))
    join = lambda x: jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])
    return carry, jax.tree.map(join, out)  # [chunks, B, width, ...] -> [B, T, ...]
