"""Whole models: load into sharded arrays, export, and merge a fine-tuned part into its base.

Loading asks the reader for each device's slice of each weight, so no host holds the model twice. Merging goes over the
base's files tensor by tensor: what was not trained is copied as it is, bit by bit.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxsft import lora, sharding, tree
from jaxsft.hub import names
from jaxsft.hub.files import CheckpointError, Reader, Tensor, copy_companions, read_json, resolve, write, write_json
from jaxsft.models import Family, Model, build, family_of, split
from jaxsft.models.decoder import DecoderConfig
from jaxsft.tree import Pattern, Tree
from jaxsft.types import Key

# Buffers that older checkpoints carry and that follow from the config.
DERIVED = ("rotary_emb.inv_freq", "masked_bias", "attn.bias")


def read_config(folder: Path) -> tuple[Family, DecoderConfig]:
    """Reads a folder's `config.json` through its family.

    Raises:
      CheckpointError: it is missing, of an unknown family, or has keys the family does not know.
    """
    config = read_json(folder / "config.json")
    try:
        family = family_of(config)
        return family, family.read_config(config)
    except ValueError as error:
        raise CheckpointError(f"{folder / 'config.json'}: {error}") from error


def shapes(config: DecoderConfig, cut: int | None = None) -> Tree:
    """The shapes of a model's parameters, without any memory; `cut` as for `models.split`."""

    def make(key: Key) -> Tree:
        params = build(config).init(key)
        return params if cut is None else split(params, cut)

    return jax.eval_shape(make, jax.random.key(0))


def load(
    path: str,
    mesh: Mesh | None = None,
    *,
    dtype: jax.typing.DTypeLike = jnp.float32,
    full_precision: Pattern = (),
    cut: int | None = None,
    remat: str = "none",
    lora_dropout: float = 0.0,
) -> tuple[Model, Tree]:
    """Loads a Hugging Face checkpoint.

    Args:
      path: a folder with config.json and safetensors, or a hub name.
      mesh: from `sharding.mesh`; one device by default. Every array lands sharded by its family's rules.
      dtype: of the computation and of the weights.
      full_precision: addresses ("params/...") whose weights are float32 whatever dtype is: those that will train.
      cut: a layer before which the stack is cut, see `models.split`.
      remat, lora_dropout: see `models.build`.

    Returns:
      (model, params).

    Raises:
      CheckpointError: a missing, truncated or corrupt file, an unknown architecture or config key, a tensor that is
        missing, superfluous, of another shape, or not finite.

    Example:
      >>> import jaxsft
      >>> model, params = load(jaxsft.BASE)
      >>> model.config.layers
      4
    """
    folder = resolve(path)
    family, config = read_config(folder)
    mesh = sharding.mesh(devices=jax.devices()[:1]) if mesh is None else mesh
    reader = Reader(folder)
    described = shapes(config, cut)
    leaves, placed = tree.flat(described), sharding.shardings(described, family.rules, mesh)
    params, wanted = {}, set()
    for path_, place in tree.flat(placed).items():
        here, transposed = names.leaf_names(family, path_)
        _check(reader, here, leaves[path_].shape, stacked=path_.startswith("blocks/"), transposed=transposed)
        wanted |= set(here)
        kind = jnp.float32 if tree.matches(full_precision, f"params/{path_}") else dtype
        params[path_] = _place(reader, here, leaves[path_].shape, transposed, kind, place)
    spare = {"lm_head.weight"} if config.tied else set()
    if unknown := sorted(n for n in set(reader.files) - wanted - spare if not n.endswith(DERIVED)):
        raise CheckpointError(f"{folder} has tensors this family does not know: {', '.join(unknown[:5])}")
    if broken := [p for p, ok in [(p, _finite(x)) for p, x in params.items()] if not ok]:
        raise CheckpointError(f"{folder} holds NaN or infinite numbers in {broken[0]}; download or export it again")
    return build(config, dtype=dtype, remat=remat, lora_dropout=lora_dropout), tree.nest(params)


@jax.jit
def _finite(x: jax.Array) -> jax.Array:
    return jnp.isfinite(x).all()


def _check(reader: Reader, here: list[str], shape: tuple[int, ...], *, stacked: bool, transposed: bool) -> None:
    expected = shape[1:] if stacked else shape
    expected = expected[::-1] if transposed else expected
    for name in here:
        if name not in reader.files:
            raise CheckpointError(f"{reader.folder} lacks the tensor {name!r}, which its config.json implies")
        if reader.shape(name) != expected:
            raise CheckpointError(
                f"{name!r} in {reader.folder} has shape {reader.shape(name)}; config.json implies {expected}"
            )
        _ = reader.dtype(name)


def _place(reader, here, shape, transposed, dtype, place) -> jax.Array:
    """Makes one leaf, each device's slice read on its own."""
    return jax.make_array_from_callback(shape, place, _part(reader, here, shape, transposed, dtype))


def _part(reader, here, shape, transposed, dtype) -> Callable[[Any], np.ndarray]:
    """Makes index -> that slice of one leaf, read from the files."""
    stacked = len(shape) == len(reader.shape(here[0])) + 1

    def part(index: Any) -> np.ndarray:
        layers, inner = (here[index[0]], index[1:]) if stacked else (here, index)
        inside = [len(range(*cut.indices(n))) for cut, n in zip(inner, shape[-len(inner) :], strict=True)]
        out = np.empty((len(layers), *inside), dtype)
        for row, name in zip(out, layers, strict=True):
            row[:] = reader.read(name, inner[::-1]).T if transposed else reader.read(name, inner)
        return out if stacked else out[0]

    return part


class OnDisk:
    """A leaf that is read when it is used: whole by `np.asarray`, one layer of it by its index."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, part: Callable[[Any], np.ndarray]):
        self.shape, self.dtype, self._part = shape, dtype, part
        self.ndim, self.size = len(shape), math.prod(shape)

    def __getitem__(self, row: int) -> np.ndarray:
        return self._part((slice(row, row + 1), *[slice(None)] * (self.ndim - 1)))[0]

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
    reader, leaves = Reader(folder), {}
    for path_, leaf in tree.flat(shapes(config, cut)).items():
        here, transposed = names.leaf_names(family, path_)
        _check(reader, here, leaf.shape, stacked=path_.startswith("blocks/"), transposed=transposed)
        kind = jnp.dtype(dtype)
        leaves[path_] = OnDisk(leaf.shape, kind, _part(reader, here, leaf.shape, transposed, kind))
    return tree.nest(leaves)


def init(
    path: str, key: Key, mesh: Mesh | None = None, *, dtype=jnp.float32, remat: str = "none"
) -> tuple[Model, Tree]:
    """Makes a fresh model of the shape that `path`/config.json describes, for training from scratch."""
    family, config = read_config(resolve(path))
    mesh = sharding.mesh(devices=jax.devices()[:1]) if mesh is None else mesh
    model = build(config, dtype=dtype, remat=remat)
    placed = sharding.shardings(shapes(config), family.rules, mesh)
    return model, jax.jit(model.init, out_shardings=placed)(key)


def fetch(leaf: jax.Array, row: int | None, *, transposed: bool, dtype: np.dtype) -> np.ndarray:
    """Brings one layer of a stacked leaf, or a whole leaf, to the host."""
    x = sharding.to_host(leaf if row is None else leaf[row])
    return (x.T if transposed else x).astype(dtype)


def export(path: str, params: Mapping, *, source: str, shard_gb: float = 5.0, dtype: str | None = None) -> list[Path]:
    """Writes parameters as a Hugging Face checkpoint.

    Args:
      path: the folder to write.
      params: of the model that `source` describes.
      source: the folder or hub name that gives config.json, tokenizer, chat template, generation config.
      shard_gb: the largest file, in 10^9 bytes.
      dtype: float32, bfloat16 or float16; by default what the config says, else float32.

    Returns:
      the weight files.

    Raises:
      CheckpointError: the disk is full, or `source` cannot be read.

    Example:
      >>> import tempfile, jaxsft
      >>> model, params = load(jaxsft.BASE)
      >>> [file.name for file in export(tempfile.mkdtemp(), params, source=jaxsft.BASE)]
      ['model.safetensors']
    """
    folder, base = Path(path), resolve(source)
    family, config = read_config(base)
    raw = read_json(base / "config.json")
    kind = dtype or raw.get("dtype") or raw.get("torch_dtype") or "float32"
    known, out = names.by_address(params), []
    for name, (address, transposed) in names.places(family, config).items():
        if address in known:
            leaf, row = known[address]
            shape = leaf.shape if row is None else leaf.shape[1:]
            make = lambda leaf=leaf, row=row, t=transposed: fetch(leaf, row, transposed=t, dtype=jnp.dtype(kind))
            out.append(Tensor(name, shape[::-1] if transposed else shape, jnp.dtype(kind), make))
    files = write(folder, out, shard_gb=shard_gb)
    parted = {"tie_word_embeddings": False} if config.tied and "head" in params else {}
    _write_config(folder, {**raw, "dtype" if "dtype" in raw else "torch_dtype": kind, **parted})
    copy_companions(base, folder)
    return files


def _write_config(folder: Path, config: Mapping) -> None:
    if jax.process_index() == 0:
        write_json(folder / "config.json", config)


def merge(
    base: str, path: str, *, adapter: Mapping | None = None, trained: Mapping | None = None, shard_gb: float = 5.0
) -> list[Path]:
    """Writes the base with a fine-tuned part folded in, file by file: W + scale A B in float32, cast once.

    Args:
      base: the checkpoint that was fine-tuned; a folder or a hub name.
      path: the folder to write.
      adapter: a LoRA tree, as `lora.init` makes it.
      trained: parameters that replace the base's; others are copied bit by bit.
      shard_gb: the largest file, in 10^9 bytes.

    Returns:
      the weight files. Where the output layer was tied to the embedding and one of the two is adapted, or trained
      alone, it gets a tensor of its own, and config.json says so.

    Raises:
      CheckpointError: a weight that the base does not have, or another shape than the base's.

    Example:
      >>> import tempfile, jaxsft
      >>> _, params = load(jaxsft.BASE)
      >>> [file.name for file in merge(jaxsft.BASE, tempfile.mkdtemp(), trained={"norm": params["norm"]})]
      ['model.safetensors']
    """
    folder, source = Path(path), resolve(base)
    if folder.exists() and folder.samefile(source):
        raise CheckpointError(f"{path} is the base itself; choose another folder to merge into")
    family, config = read_config(source)
    reader, known = Reader(source), names.places(family, config)
    new, low = names.by_address(trained or {}), names.adapted(adapter or {})
    files = {name: name for name in reader.files}  # what is written: what it is read from
    table, output = (names.Address(f"{layer}/table", None) for layer in ("embed", "head"))
    parts = config.tied and (table in low or output in low or output in new)
    if config.tied:
        [embed], [head] = (names.leaf_names(family, address.path)[0] for address in (table, output))
        if parts:
            files[head] = embed
            new = {output: new[table], **new} if table in new else new
        else:  # some tied checkpoints carry the output layer all the same: it follows the embedding
            known[head] = known[embed]

    def make(name: str) -> np.ndarray:
        old, full = reader.read(files[name]), np.dtype("float32")
        if name not in known:
            return old
        address, transposed = known[name]
        result = fetch(*new[address], transposed=transposed, dtype=full) if address in new else old
        if result.shape != old.shape:
            raise CheckpointError(f"{name!r} was trained with shape {result.shape}, but {source} has {old.shape}")
        if address in low:
            leaves = {part: fetch(*leaf, transposed=False, dtype=full) for part, leaf in low[address].items()}
            turned = transposed or address == output
            wanted = (leaves["a"].shape[-2], leaves["b"].shape[-1])
            if wanted != (old.shape[::-1] if turned else old.shape):
                wanted = wanted[::-1] if turned else wanted
                raise CheckpointError(f"the adapter of {name!r} has shape {wanted}, but {source} has {old.shape}")
            result = lora.adapted(result.T if turned else result, leaves)
            result = result.T if turned else result
        return result.astype(old.dtype)

    have = {known[name].address for name in files if name in known}
    if missing := sorted((set(new) | set(low)) - have, key=str):
        raise CheckpointError(
            f"{source} has no {missing[0].path} (layer {missing[0].layer}) to merge into; is it the base?"
        )
    tensors = [Tensor(n, reader.shape(old), reader.dtype(old), lambda n=n: make(n)) for n, old in files.items()]
    written = write(folder, tensors, shard_gb=shard_gb)
    _write_config(folder, read_json(source / "config.json") | ({"tie_word_embeddings": False} if parts else {}))
    copy_companions(source, folder)
    return written
