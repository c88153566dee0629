"""Where tokens and output table lie on a mesh, and a function that each device runs over what it has of them."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array

from jaxsft import axes
from jaxsft.losses.chunks import Table, vocabulary


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

    def offset(self, table: Table) -> Any:
        """On a device, the number of its first row of the vocabulary."""
        return jax.lax.axis_index(self.tensor) * vocabulary(table) if self.tensor else 0

    def run(self, function: Callable, given: tuple, table: Table, out: Any, dtype: jax.typing.DTypeLike) -> Any:
        """function(*given, table) of each device's slices; given are arrays [B, T, ...].

        The table is gathered over `fsdp` on the way, once, in the dtype of the computation.
        """
        if self.mesh is None:
            return function(*given, table)
        table = table if isinstance(table, Mapping) else table.astype(dtype)
        specs = (*(jax.tree.map(lambda _: self.tokens, x) for x in given), self.table(table))
        cut = jax.shard_map(function, mesh=self.mesh, in_specs=specs, out_specs=out, check_vma=False)
        return cut(*given, table)

    @property
    def apart(self) -> tuple[str, ...]:
        """The axes whose devices have other tokens."""
        return (*self.rows, *([self.context] if self.context else []))

    def all(self, x: Array) -> Array:
        """The sum over the devices that have other tokens."""
        return jax.lax.psum(x, self.apart) if self.apart else x

    def summed(self, x: Array) -> Array:
        """The sum over the devices that have other tokens; what `fsdp` cuts of the last dimension stays cut."""
        over = list(self.apart)
        if self.split(x.shape[-1]):
            x = jax.lax.psum_scatter(x, axes.FSDP, scatter_dimension=x.ndim - 1, tiled=True)
            over.remove(axes.FSDP)
        return jax.lax.psum(x, tuple(over)) if over else x

    def split(self, width: int) -> str | None:
        """The axis that cuts the last dimension of what `summed` gives."""
        return axes.FSDP if self.mesh and axes.FSDP in self.rows and _cuts(self.mesh, axes.FSDP, width) else None


def shards(mesh: Mesh | None, shape: tuple[int, int], size: int) -> Shards:
    """How a mesh cuts tokens [B, T] and `size` rows of the vocabulary."""
    if mesh is None or mesh.size == 1:
        return Shards(None)
    B, T = shape
    return Shards(
        mesh,
        axes.ROWS if B % axes.rows(mesh) == 0 else (),
        axes.CONTEXT if _cuts(mesh, axes.CONTEXT, T) else None,
        axes.TENSOR if _cuts(mesh, axes.TENSOR, size) else None,
    )


def _cuts(mesh: Mesh, axis: str, size: int) -> bool:
    return mesh.shape[axis] > 1 and size % mesh.shape[axis] == 0
