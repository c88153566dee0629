"""The sum of log-probabilities as one operation, where the output layer trains: its gradient is formed going forward.

What a loss makes of each log-probability is known only in the backward pass, so there `logprobs` makes the scores of a
trained table again: four products of the size of the scores. Of a plain sum it is known beforehand that each token
counts once. So the gradients to features and table can be formed while a chunk's scores are there, and the backward
pass only scales them: three products (Hsu et al. 2024, arXiv:2410.10989, section 3.2).

A chunk's scores are whole rows here, [t, V], since both gradients need the softmax's sum first; they are as many scores
as `Chunk` names, or those of `FEWEST` tokens.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from jaxsft.losses.chunks import Head, Table, compact, over_tokens, vocabulary
from jaxsft.losses.logprobs import everything, is_given
from jaxsft.losses.shards import shards

FEWEST = 512  # tokens of a chunk; of fewer the table would be read, and its gradient written, too often


def total(
    features: Float[Array, "B T D"],
    table: Table,
    targets: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    **head: Any,
) -> Float[Array, ""]:
    """`logprobs(...).sum()`, with a gradient that is cheaper where the table trains.

    Args:
      features, table, targets, mask: as for `logprobs`.
      head: scale, soft_cap, temperature, chunk and mesh of `logprobs`.

    Example:
      >>> features, table = jnp.ones((1, 3, 2)), jnp.zeros((5, 2))
      >>> round(float(total(features, table, jnp.array([[1, 2, 3]]), jnp.array([[True, True, False]]))), 3)
      -3.219
    """
    return jax.jit(_total, static_argnums=4)(features, table, targets, mask, Head(**head))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _total(features, table, targets, mask, head: Head) -> Array:
    return everything(features, table, targets, mask, head).logprobs.sum()


def _forward(features, table, targets, mask, head: Head):
    trains = is_given(table) and table.perturbed
    values: Any = jax.tree.map(lambda x: x.value, (features, table, targets, mask), is_leaf=is_given)
    features, table, targets, mask = values
    if trains and not shards(head.mesh, mask.shape, vocabulary(table)).tensor:
        return _formed(features, table, targets, mask, head)
    lp = lambda features, table: everything(features, table, targets, mask, head).logprobs.sum()
    if trains:
        value, pull = jax.vjp(lp, features, table)
        return value, pull(jnp.float32(1))
    value, pull = jax.vjp(lambda features: lp(features, table), features)
    return value, (*pull(jnp.float32(1)), None)


def _backward(head: Head, kept: tuple, scale: Array):
    if isinstance(scale, jax.custom_derivatives.SymbolicZero):
        scale = jnp.float32(0)
    times = lambda x: None if x is None else (scale * x).astype(x.dtype)
    return *map(times, kept), None, None


_total.defvjp(_forward, _backward, symbolic_zeros=True)


def _formed(features, table, targets, mask, head: Head) -> tuple[Array, tuple[Array, Array]]:
    """The sum, and its gradients to features and table."""
    where, kind = shards(head.mesh, mask.shape, vocabulary(table)), features.dtype
    most = max(FEWEST, head.block.tokens * head.block.vocabulary // vocabulary(table))

    def local(features, targets, mask, table):
        rows, wide = compact(mask.ravel(), most), table.astype(kind)
        features, targets = features.reshape(mask.size, -1), targets.ravel()

        def step(carry, start):
            lp, grad_table = carry
            f, y = rows.take(features, start), rows.take(targets, start)[:, None]
            there = (start + jnp.arange(rows.width) < rows.count)[:, None]
            scores = head.scores(jnp.einsum("td,vd->tv", f, wide, preferred_element_type=jnp.float32))
            logsumexp = jax.nn.logsumexp(scores, axis=-1, keepdims=True)
            lp += jnp.where(there, jnp.take_along_axis(scores, y, axis=-1) - logsumexp, 0).sum()
            moved = (jnp.arange(len(wide)) == y) - jnp.exp(scores - logsumexp)
            moved = jnp.where(there, moved * head.slope(scores), 0).astype(kind)
            grad_table += jnp.einsum("tv,td->vd", moved, f, preferred_element_type=jnp.float32)
            grad_features = jnp.einsum("tv,vd->td", moved, wide, preferred_element_type=jnp.float32)
            return (lp, grad_table), grad_features.astype(kind)

        start = jnp.float32(0), jnp.zeros(table.shape, jnp.float32)
        (lp, grad_table), grad_features = over_tokens(step, start, rows)
        grad_features = rows.back(grad_features).reshape(*mask.shape, -1)
        return where.all(lp), grad_features, where.summed(grad_table)

    out = PartitionSpec(), where.tokens, PartitionSpec(None, where.split(table.shape[1]))
    lp, grad_features, grad_table = where.run(local, (features, targets, mask), table, out, kind)
    return lp, (grad_features, grad_table.astype(table.dtype))
