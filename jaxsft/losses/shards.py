"""Where tokens and output table lie on a mesh, and a function that each device runs over what it has of them."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Int

from jaxsft.losses.chunks import Table, vocabulary

TENSOR, CONTEXT, FSDP = "tensor", "context", "fsdp"


class Shards(NamedTuple):
    """Which axes of a mesh cut what; an axis that does not divide a dimension cuts nothing."""

    mesh: Mesh | None  # None: one device
    rows: tuple[str, ...] = ()  # B
    context: str | None = None  # T
    tensor: str | None = None  # V

    @property
    def tokens(self) -> PartitionSpec:
        """Of arrays [B, T, ...]."""
        return PartitionSpec(self.rows or None, self.context)

    def table(self, table: Table) -> Any:
        """Of the table, all of D on each device."""
        if isinstance(table, Mapping):
            return {name: PartitionSpec(*[None] * (x.ndim - 1), self.tensor) for name, x in table.items()}
        return PartitionSpec(self.tensor, None)

    def offset(self, table: Table) -> Int[Array, ""] | int:
        """On a device, the number of its first row of the vocabulary."""
        return jax.lax.axis_index(self.tensor) * vocabulary(table) if self.tensor else 0

    def run(self, function: Callable, given: tuple, table: Table, out: Any) -> Any:
        """function(*given, table) of each device's slices; given are arrays [B, T, ...]."""
        if self.mesh is None:
            return function(*given, table)
        specs = (*(jax.tree.map(lambda _: self.tokens, x) for x in given), self.table(table))
        cut = jax.shard_map(function, mesh=self.mesh, in_specs=specs, out_specs=out, check_vma=False)
        return cut(*given, table)

    def summed(self, x: Array) -> Array:
        """The sum over the devices that have other tokens; what `fsdp` cuts of the last dimension stays cut."""
        axes = (*self.rows, *([self.context] if self.context else []))
        if self.split(x.shape[-1]):
            x = jax.lax.psum_scatter(x, FSDP, scatter_dimension=x.ndim - 1, tiled=True)
            axes = tuple(axis for axis in axes if axis != FSDP)
        return jax.lax.psum(x, axes) if axes else x

    def split(self, width: int) -> str | None:
        """The axis that cuts the last dimension of what `summed` gives."""
        return (
            FSDP
            if self.mesh and FSDP in self.rows and self.mesh.shape[FSDP] > 1 and width % self.mesh.shape[FSDP] == 0
            else None
        )


def shards(mesh: Mesh | None, shape: tuple[int, int], size: int) -> Shards:
    """How a mesh cuts tokens [B, T] and `size` rows of the vocabulary."""
    if mesh is None or mesh.size == 1:
        return Shards(None)
    B, T = shape
    rows = tuple(axis for axis in mesh.axis_names if axis not in (CONTEXT, TENSOR))
    divides = lambda axis, n: axis in mesh.shape and mesh.shape[axis] > 1 and n % mesh.shape[axis] == 0
    return Shards(
        mesh,
        rows if B % math.prod(mesh.shape[axis] for axis in rows) == 0 else (),
        CONTEXT if divides(CONTEXT, T) else None,
        TENSOR if divides(TENSOR, size) else None,
    )
