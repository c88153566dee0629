"""Exact nearest vectors by plain matrix products, over all devices: for corpora that fit into their memory.

    matrix [N D], cut over the devices -> blocks of rows -> product with all queries -> the best k so far -> merged

With `recall_target` each block gives its best by `jax.lax.approx_max_k`, the operation that accelerators have for this
(Chern et al. 2022, arXiv:2206.14286); on a CPU that is exact, too. Scores are float32 whatever the matrix is.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from jaxsft import sharding

BLOCK = 16_384  # rows of one product; of 1000 queries its scores are 66 MB


class Placed(NamedTuple):
    """A matrix on the devices, for many calls of `nearest`."""

    rows: Float[Array, "M D"]  # with rows of padding at the end
    count: int
    mesh: Mesh


def place(
    matrix: Float[np.ndarray, "N D"], mesh: Mesh | None = None, dtype: jax.typing.DTypeLike = jnp.float32
) -> Placed:
    """Cuts the rows of a matrix over the devices of a mesh; all devices by default.

    Args:
      matrix: a vector a row.
      mesh: from `sharding.mesh`.
      dtype: bfloat16 takes half the memory, and rounds cosines to about three digits.
    """
    mesh = sharding.mesh() if mesh is None else mesh
    each = -(-len(matrix) // mesh.size)
    blocks = max(1, -(-each // BLOCK))
    rows = mesh.size * blocks * max(1, -(-each // blocks))
    padded = np.zeros((rows, matrix.shape[1]), jnp.dtype(dtype))
    padded[: len(matrix)] = matrix
    return Placed(jax.device_put(padded, NamedSharding(mesh, PartitionSpec(mesh.axis_names))), len(matrix), mesh)


def nearest(
    matrix: Float[np.ndarray, "N D"] | Placed,
    queries: Float[np.ndarray, "Q D"],
    k: int,
    mesh: Mesh | None = None,
    recall_target: float | None = None,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> tuple[Float[Array, "Q k"], Int[Array, "Q k"]]:
    """Finds the k rows with the greatest dot product with each query.

    Args:
      matrix: a vector a row; what `place` made of it, if it is asked more than once.
      queries: a vector a row.
      k: how many; all where there are fewer rows.
      mesh, dtype: as for `place`, of a matrix that is not placed yet.
      recall_target: None is exact; 0.95 finds that share of them, faster on accelerators.

    Returns:
      the products, the greatest first, and the numbers of the rows.

    Raises:
      ValueError: k is not positive, or queries have another width.

    Example:
      >>> scores, rows = nearest(np.eye(4, 3), np.array([[0.1, 0.9, 0.5]]), 2)
      >>> rows.tolist()
      [[1, 2]]
    """
    placed = matrix if isinstance(matrix, Placed) else place(matrix, mesh, dtype)
    if k < 1 or queries.shape[1] != placed.rows.shape[1]:
        shapes = f"queries {queries.shape} and a matrix of width {placed.rows.shape[1]}"
        raise ValueError(f"k is {k}, {shapes}; give a k of at least 1, and queries as wide as the matrix")
    k = min(k, placed.count)
    return _nearest(placed.rows, jnp.asarray(queries, placed.rows.dtype), placed.count, k, recall_target, placed.mesh)


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def _nearest(rows: Array, queries: Array, count: int, k: int, recall_target: float | None, mesh: Mesh):
    each = len(rows) // mesh.size
    block = each // max(1, -(-each // BLOCK))
    cut, whole = PartitionSpec(mesh.axis_names), PartitionSpec()

    def own(rows: Float[Array, "M D"], queries: Float[Array, "Q D"]) -> tuple[Array, Array]:
        first = jax.lax.axis_index(mesh.axis_names) * each

        def look(best: tuple[Array, Array], at: Array) -> tuple[tuple[Array, Array], None]:
            part = jax.lax.dynamic_slice_in_dim(rows, at, block)
            # HIGHEST: accelerators would round float32 to bfloat16 or TF32 before they multiply.
            product = jnp.einsum("qd,md->qm", queries, part, precision="highest", preferred_element_type=jnp.float32)
            number = first + at + jnp.arange(block)
            product = jnp.where(number < count, product, -jnp.inf)
            most = min(k, block)
            if recall_target is None:
                values, places = jax.lax.top_k(product, most)
            else:
                values, places = jax.lax.approx_max_k(product, most, recall_target=recall_target)
            values = jnp.concatenate([best[0], values], axis=1)
            numbers = jnp.concatenate([best[1], number[places]], axis=1)
            values, places = jax.lax.top_k(values, k)
            return (values, jnp.take_along_axis(numbers, places, axis=1)), None

        none = jnp.full((len(queries), k), -jnp.inf), jnp.zeros((len(queries), k), jnp.int32)
        none = jax.lax.pcast(none, mesh.axis_names, to="varying")
        best, _ = jax.lax.scan(look, none, jnp.arange(0, each, block))
        return best

    found = jax.shard_map(own, mesh=mesh, in_specs=(cut, whole), out_specs=(PartitionSpec(None, mesh.axis_names),) * 2)
    values, numbers = found(rows, queries)  # [Q, devices * k]
    values, places = jax.lax.top_k(values, k)
    return values, jnp.take_along_axis(numbers, places, axis=1)
