"""Weights of transformers' Flax models, which version 5 removed: flax_model.msgpack, read without Flax or pickle.

The file is one nested map of arrays; names and layout become those of PyTorch, as transformers converted them:

    encoder/layer/0/output/dense/kernel       [in, out]   ->   encoder.layer.0.output.dense.weight       [out, in]
    encoder/layer/0/output/LayerNorm/scale    [D]         ->   encoder.layer.0.output.LayerNorm.weight   [D]
    embeddings/word_embeddings/embedding      [V, D]      ->   embeddings.word_embeddings.weight         [V, D]

A kernel of Flax's GPT-2 is [out, in] and PyTorch's [in, out], so the same rule holds there. One pass over the file
finds where each array lies; its numbers are read when they are asked for.

Source: `flax.serialization`, `modeling_flax_pytorch_utils.py` of transformers 4.
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import jax.numpy as jnp
import msgpack
import numpy as np

from jaxsft.hub.files import DTYPES, FLOATS, CheckpointError, read_json

SINGLE, INDEX = "flax_model.msgpack", "flax_model.msgpack.index.json"
CHUNKED = "__msgpack_chunked_array__"  # arrays above a gigabyte come in pieces
ARRAYS = {1, 3}  # the extension types of Flax that hold an array, or a scalar as one
RENAMED = {"kernel": "weight", "scale": "weight", "embedding": "weight"}
MAPS = {0xDE, 0xDF, *range(0x80, 0x90)}  # the first byte of a map


class Stored(NamedTuple):
    """An array in a file: the pieces of it, one after the other, in C order."""

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    pieces: tuple[tuple[int, int], ...]  # where each begins, and how many numbers it has
    turned: bool = False  # to be transposed

    def read(self, index: tuple[slice, ...]) -> np.ndarray:
        """The part that `index` names, copied: no file stays mapped after."""
        if len(self.pieces) == 1 and all(self.shape):
            whole: Any = np.memmap(self.file, self.dtype, "r", self.pieces[0][0], self.shape)
        else:
            parts = [np.fromfile(self.file, self.dtype, count, offset=at) for at, count in self.pieces]
            whole = np.concatenate(parts).reshape(self.shape)
        whole = whole.T if self.turned else whole
        return np.array(whole[index if index else ...])


class Reader:
    """The tensors of a folder, by their PyTorch names; see `files.Reader`, which it stands in for."""

    def __init__(self, folder: Path):
        self.folder = folder
        index = folder / INDEX
        sharded = not (folder / SINGLE).is_file()
        names = sorted(set(read_json(index).get("weight_map", {}).values())) if sharded else [SINGLE]
        self._arrays: dict[str, Stored] = {}
        self.files: dict[str, str] = {}
        for file in names:
            if not (folder / file).is_file():
                raise CheckpointError(f"shard {folder / file} is missing, though {INDEX} names it; download it again")
            for path, array in _arrays(folder / file):
                *modules, last = path
                name = ".".join([*modules, RENAMED.get(last, last)])
                self._arrays[name] = array._replace(turned=last == "kernel")
                self.files[name] = file

    def shape(self, name: str) -> tuple[int, ...]:
        array = self._arrays[name]
        return array.shape[::-1] if array.turned else array.shape

    def dtype(self, name: str, known: Mapping[str, np.dtype] = FLOATS) -> np.dtype:
        kind = self._arrays[name].dtype
        if kind not in known.values():
            raise CheckpointError(
                f"{name!r} in {self.folder} has dtype {kind}; float32, float16 and bfloat16 are supported"
            )
        return kind

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """Reads a tensor, or the part of it that `index` names."""
        return self._arrays[name].read(index)


def found(folder: Path) -> bool:
    return (folder / SINGLE).is_file() or (folder / INDEX).is_file()


def _arrays(file: Path) -> list[tuple[tuple[str, ...], Stored]]:
    """Every array of a file, by the path of its keys.

    Raises:
      CheckpointError: it is truncated or corrupt, or holds something else.
    """
    try:
        with file.open("rb") as opened:
            unpacker = msgpack.Unpacker(opened, max_buffer_size=0, strict_map_key=True)
            tree = _value(unpacker, opened, file)
            end = unpacker.tell()
        if not isinstance(tree, dict) or end != file.stat().st_size:
            raise ValueError(f"a map of arrays was expected, and nothing behind it; there is something at byte {end:,}")
        params = tree["params"] if list(tree) == ["params"] else tree
        return list(_leaves(params, (), file))
    except CheckpointError:
        raise
    except (msgpack.UnpackException, ValueError, TypeError, AttributeError, KeyError, RecursionError, OSError) as error:
        said = str(error) or type(error).__name__
        raise CheckpointError(
            f"{file} ({file.stat().st_size:,} bytes) is truncated or corrupt ({said}); download or export it again"
        ) from error


def _value(unpacker: msgpack.Unpacker, opened: BinaryIO, file: Path) -> Any:
    """The next value: maps as they are, arrays as the place where they lie."""
    (first,) = os.pread(opened.fileno(), 1, unpacker.tell()) or b"\0"
    if first in MAPS:
        size = unpacker.read_map_header()
        return {unpacker.unpack(): _value(unpacker, opened, file) for _ in range(size)}
    value = unpacker.unpack()
    return _stored(value, unpacker.tell(), file) if isinstance(value, msgpack.ExtType) else value


def _stored(value: msgpack.ExtType, end: int, file: Path) -> Stored:
    """An array of Flax: (shape, name of the dtype, bytes), so the bytes are what the value ends with."""
    if value.code not in ARRAYS:
        known = "arrays (1) and scalars (3) of Flax are read"
        raise CheckpointError(f"{file} holds a value of extension type {value.code}; only {known}; export it again")
    shape, kind, numbers = msgpack.unpackb(value.data, raw=True)
    dtype, shape = jnp.dtype(kind.decode()), tuple(shape)
    count = int(np.prod(shape, dtype=np.int64))
    if dtype not in DTYPES.values() or min(shape, default=0) < 0 or len(numbers) != count * dtype.itemsize:
        raise ValueError(f"an array of shape {shape} and dtype {dtype} has {len(numbers)} bytes")
    return Stored(file, dtype, shape, ((end - len(numbers), count),))


def _leaves(tree: Any, path: tuple[str, ...], file: Path) -> Iterator[tuple[tuple[str, ...], Stored]]:
    if isinstance(tree, Stored):
        yield path, tree
    elif isinstance(tree, dict) and CHUNKED in tree:
        yield path, _joined(tree, file)
    elif isinstance(tree, dict) and all(isinstance(key, str) for key in tree):
        for key, value in tree.items():
            yield from _leaves(value, (*path, key), file)
    else:
        raise CheckpointError(f"{file} holds {type(tree).__name__} at {'/'.join(path)}; arrays were expected")


def _joined(tree: Mapping[str, Any], file: Path) -> Stored:
    listed = lambda part: [part[str(i)] for i in range(len(part))]
    chunks, shape = listed(tree["chunks"]), tuple(listed(tree["shape"]))
    pieces = tuple(piece for chunk in chunks for piece in chunk.pieces)
    if sum(count for _, count in pieces) != np.prod(shape, dtype=np.int64):
        raise ValueError(f"the pieces of an array do not fill its shape {shape}")
    return Stored(file, chunks[0].dtype, shape, pieces)
