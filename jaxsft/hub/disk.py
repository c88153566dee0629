"""Weights read when they are used: one leaf of a checkpoint, one layer of it, or one device's slice.

No more of a file is in memory than the part that was asked for, cast to the dtype that was asked for.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsft import tree
from jaxsft.hub import names
from jaxsft.hub.files import CheckpointError, resolve
from jaxsft.hub.source import Weights, open_weights, read_config, shapes
from jaxsft.tree import Tree


def check(reader: Weights, here: np.ndarray, shape: tuple[int, ...], transposed: bool) -> None:
    """Refuses tensors that a file lacks, or has in another shape or dtype than the leaf of `shape` needs."""
    expected = shape[here.ndim :]
    expected = expected[::-1] if transposed else expected
    for name in here.flat:
        if name not in reader.files:
            raise CheckpointError(f"{reader.folder} lacks the tensor {name!r}, which its config.json implies")
        if reader.shape(name) != expected:
            raise CheckpointError(
                f"{name!r} in {reader.folder} has shape {reader.shape(name)}; config.json implies {expected}"
            )
        _ = reader.dtype(name)


def part_of(reader, here, shape, transposed, dtype) -> Callable[[Any], np.ndarray]:
    """Makes index -> that slice of one leaf, read from the files."""

    def part(index: Any) -> np.ndarray:
        tensors, inner = np.asarray(here[index[: here.ndim]]), index[here.ndim :]
        inside = [len(range(*cut.indices(n))) for cut, n in zip(inner, shape[here.ndim :], strict=True)]
        out = np.empty((*tensors.shape, *inside), dtype)
        for at, name in np.ndenumerate(tensors):
            out[at] = reader.read(name, inner[::-1]).T if transposed else reader.read(name, inner)
        return out

    return part


def once(part: Callable[[Any], np.ndarray]) -> Callable[[Any], np.ndarray]:
    """Reads each slice one time, however many devices hold it.

    Example:
      >>> read = once(lambda index: print("read") or np.zeros(4)[index])
      >>> read((slice(0, 2),)) is read((slice(0, 2),))
      read
      True
    """
    known: dict[tuple, np.ndarray] = {}

    def read(index: Any) -> np.ndarray:
        place = tuple((cut.start, cut.stop) for cut in index)
        if place not in known:
            known[place] = part(index)
        return known[place]

    return read


class OnDisk:
    """A leaf that is read when it is used: whole by `np.asarray`, one layer of it by its index."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, part: Callable[[Any], np.ndarray]):
        self.shape, self.dtype, self._part = shape, dtype, part
        self.ndim, self.size = len(shape), math.prod(shape)

    def __getitem__(self, index: int | tuple[int, ...]) -> np.ndarray:
        index = index if isinstance(index, tuple) else (index,)
        rest = [slice(None)] * (self.ndim - len(index))
        return self._part((*(slice(i, i + 1) for i in index), *rest))[(0,) * len(index)]

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        whole = self._part((slice(None),) * self.ndim)
        return whole if dtype is None else whole.astype(dtype)

    @property
    def T(self) -> np.ndarray:  # noqa: N802
        return np.asarray(self).T


def on_disk(path: str, *, dtype: jax.typing.DTypeLike = jnp.float32, cut: int | None = None) -> Tree:
    """A checkpoint's parameters, read leaf by leaf and layer by layer as they are used: what needs few of them.

    Args:
      path: a folder with config.json and safetensors, or a hub name.
      dtype, cut: as for `load`.

    Example:
      >>> import jaxsft
      >>> kernel = on_disk(jaxsft.BASE)["blocks"]["0-3"]["attn"]["q"]["kernel"]
      >>> kernel.shape, kernel[1].shape
      ((4, 192, 192), (192, 192))
    """
    folder = resolve(path)
    family, config = read_config(folder)
    reader, leaves = open_weights(folder), {}
    for path_, leaf in tree.flat(shapes(config, cut)).items():
        here, transposed = names.leaf_names(family, path_, leaf.shape, reader.files)
        check(reader, here, leaf.shape, transposed)
        kind = jnp.dtype(dtype)
        leaves[path_] = OnDisk(leaf.shape, kind, part_of(reader, here, leaf.shape, transposed, kind))
    return tree.nest(leaves)
