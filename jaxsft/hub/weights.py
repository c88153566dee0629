"""Whole models: load into sharded arrays, export, and merge a fine-tuned part into its base.

Loading asks the reader for each device's slice of each weight, so no host holds the model twice; kernels that are to be
packed are read and packed tensor by tensor, so that in full precision they never exist together. Merging goes over the
base's files tensor by tensor: what was not trained is copied as it is, bit by bit.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxsft import lora, quant, sharding, tree
from jaxsft.hub import msgpack, names
from jaxsft.hub.files import (
    DTYPES,
    FLOATS,
    CheckpointError,
    Reader,
    Tensor,
    copy_companions,
    has_safetensors,
    read_json,
    resolve,
    write,
    write_json,
)
from jaxsft.models import EncoderConfig, Family, Model, ModelConfig, build, family_of, split
from jaxsft.tree import Pattern, Tree
from jaxsft.types import Key

Weights = Reader | msgpack.Reader


def read_config(folder: Path) -> tuple[Family, ModelConfig]:
    """Reads a folder's `config.json` through its family.

    An encoder whose files hold nothing of a head has none, whatever its architecture is called: sentence encoders often
    keep the config of the model that they came from.

    Raises:
      CheckpointError: it is missing, of an unknown family, or has keys the family does not know.
    """
    raw = read_json(folder / "config.json")
    try:
        family = family_of(raw)
        config = family.read_config(raw)
    except ValueError as error:
        raise CheckpointError(f"{folder / 'config.json'}: {error}") from error
    if isinstance(config, EncoderConfig) and config.mlm and has_weights(folder):
        files = open_weights(folder).files
        head = [names.stored(family, name.hf, files) for name in family.names if name.path.startswith("mlm/")]
        return family, dataclasses.replace(config, mlm=not files.keys().isdisjoint(head))
    return family, config


def has_weights(folder: Path) -> bool:
    return has_safetensors(folder) or msgpack.found(folder)


def open_weights(folder: Path) -> Weights:
    """The tensors of a folder: its safetensors, or else what transformers' Flax models saved.

    Raises:
      CheckpointError: it has neither, or a file is truncated or corrupt.
    """
    return Reader(folder) if has_safetensors(folder) or not msgpack.found(folder) else msgpack.Reader(folder)


def shapes(config: ModelConfig, cut: int | None = None) -> Tree:
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
      path: a folder with config.json and safetensors (or an old flax_model.msgpack), or a hub name.
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
    kind = {"dtype": dtype, "full_precision": full_precision, "cut": cut, "remat": remat, "lora_dropout": lora_dropout}
    model, variables = load_variables(path, mesh, **kind)
    return model, variables["params"]


def load_variables(
    path: str,
    mesh: Mesh | None = None,
    *,
    quantise: str = "none",
    dtype: jax.typing.DTypeLike = jnp.float32,
    full_precision: Pattern = (),
    cut: int | None = None,
    remat: str = "none",
    lora_dropout: float = 0.0,
) -> tuple[Model, dict[str, Tree]]:
    """Loads a Hugging Face checkpoint, its kernels packed if wanted; the other arguments are those of `load`.

    Args:
      quantise: how the kernels of the layers are packed, "int8" or "nf4" (see `quant`), or "none". Embeddings, norms,
        biases and the output layer are parameters in any case.

    Returns:
      (model, variables): {"params": ...}, and "packed" where there is something packed.

    Raises:
      ValueError: a kernel that `full_precision` names would be packed.
      CheckpointError: as `load`.

    Example:
      >>> import jaxsft
      >>> model, variables = load_variables(jaxsft.BASE, quantise="nf4")
      >>> sorted(variables["packed"]["blocks"]["0-3"]["attn"]["q"])
      ['absmax', 'absmax_mean', 'absmax_scale', 'codes']
    """
    folder = resolve(path)
    family, config = read_config(folder)
    mesh = sharding.mesh(devices=jax.devices()[:1]) if mesh is None else mesh
    reader = open_weights(folder)
    described = shapes(config, cut)
    leaves, placed = tree.flat(described), sharding.shardings(described, family.rules, mesh)
    packs = _packs(leaves, quantise)
    quant.check(full_precision, packs)
    params, packed, wanted = {}, {}, set()
    for path_, place in tree.flat(placed).items():
        here, transposed = names.leaf_names(family, path_, leaves[path_].shape, reader.files)
        _check(reader, here, leaves[path_].shape, transposed)
        wanted |= set(here.flat)
        if path_ in packs:
            parts = _pack(reader, here, leaves[path_].shape, transposed, quantise)
            host = {f"{path_.removesuffix('/kernel')}/{name}": part for name, part in parts.items()}
            packed |= _put(host, sharding.shardings(host, quant.rules(family.rules), mesh))
        else:
            kind = jnp.float32 if tree.matches(full_precision, f"params/{path_}") else dtype
            params[path_] = _place(reader, here, leaves[path_].shape, transposed, kind, place)
    spare = {copy for copy, _ in family.copies} if config.tied else set()
    if unknown := sorted(n for n in set(reader.files) - wanted - spare if not names.unused(family, n)):
        raise CheckpointError(f"{folder} has tensors this family does not know: {', '.join(unknown[:5])}")
    if broken := [p for p, ok in [(p, _finite(x)) for p, x in params.items()] if not ok]:
        raise CheckpointError(f"{folder} holds NaN or infinite numbers in {broken[0]}; download or export it again")
    model = build(config, dtype=dtype, remat=remat, lora_dropout=lora_dropout, mesh=mesh)
    return model, {"params": tree.nest(params)} | ({"packed": tree.nest(packed)} if packed else {})


def _packs(leaves: Mapping, quantise: str) -> list[str]:
    """The kernels that are packed: those of the layers that get an adapter too, not what routes tokens to experts."""
    return [p for p in leaves if quantise != "none" and tree.matches(f"blocks/{lora.ALL}/kernel", p)]


def abstract(
    path: str,
    mesh: Mesh,
    *,
    dtype: jax.typing.DTypeLike = jnp.float32,
    full_precision: Pattern = (),
    cut: int | None = None,
    remat: str = "none",
    lora_dropout: float = 0.0,
    quantise: str = "none",
) -> tuple[Model, Tree]:
    """What `load_variables` would give, as shapes with shardings: it reads config.json alone.

    Example:
      >>> import jaxsft
      >>> model, variables = abstract(jaxsft.BASE, sharding.mesh(devices=jax.devices()[:1]), quantise="int8")
      >>> variables["packed"]["blocks"]["0-3"]["attn"]["q"]["codes"].dtype
      dtype('int8')
    """
    family, config = read_config(resolve(path))
    described = tree.flat(shapes(config, cut))
    packs = _packs(described, quantise)
    quant.check(full_precision, packs)

    kind = lambda path: jnp.float32 if tree.matches(full_precision, f"params/{path}") else dtype
    plain = {p: jax.ShapeDtypeStruct(x.shape, kind(p)) for p, x in described.items() if p not in packs}
    packed = {}
    for p in packs:
        parts = jax.eval_shape(lambda p=p: quant.pack(jnp.zeros(described[p].shape), quantise))
        packed |= {f"{p.removesuffix('/kernel')}/{name}": part for name, part in parts.items()}
    variables = {"params": sharding.abstract(tree.nest(plain), family.rules, mesh)}
    if packed:
        variables["packed"] = sharding.abstract(tree.nest(packed), quant.rules(family.rules), mesh)
    return build(config, dtype=dtype, remat=remat, lora_dropout=lora_dropout, mesh=mesh), variables


@jax.jit
def _finite(x: jax.Array) -> jax.Array:
    return jnp.isfinite(x).all()


def _check(reader: Weights, here: np.ndarray, shape: tuple[int, ...], transposed: bool) -> None:
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


def _place(reader, here, shape, transposed, dtype, place) -> jax.Array:
    """Makes one leaf, each device's slice read on its own."""
    return jax.make_array_from_callback(shape, place, _part(reader, here, shape, transposed, dtype))


def _part(reader, here, shape, transposed, dtype) -> Callable[[Any], np.ndarray]:
    """Makes index -> that slice of one leaf, read from the files."""

    def part(index: Any) -> np.ndarray:
        tensors, inner = np.asarray(here[index[: here.ndim]]), index[here.ndim :]
        inside = [len(range(*cut.indices(n))) for cut, n in zip(inner, shape[here.ndim :], strict=True)]
        out = np.empty((*tensors.shape, *inside), dtype)
        for at, name in np.ndenumerate(tensors):
            out[at] = reader.read(name, inner[::-1]).T if transposed else reader.read(name, inner)
        return out

    return part


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
        _check(reader, here, leaf.shape, transposed)
        kind = jnp.dtype(dtype)
        leaves[path_] = OnDisk(leaf.shape, kind, _part(reader, here, leaf.shape, transposed, kind))
    return tree.nest(leaves)


_packed = jax.jit(quant.pack, static_argnums=1)


def _pack(reader, here, shape, transposed, kind) -> dict[str, np.ndarray]:
    """Packs the kernels of some layers; one tensor is read at a time, and whole: its scales are over all of it."""
    like = jax.eval_shape(lambda: quant.pack(jnp.zeros(shape), kind))
    stacks = {part: np.empty(x.shape, x.dtype) for part, x in like.items()}
    read = lambda name: reader.read(name).T if transposed else reader.read(name)
    for row, name in np.ndenumerate(here):
        # Nothing is bound to the tensor, so that it is gone before the next is read; jit would hold on to its argument.
        parts = jax.device_get(_packed(jax.device_put(read(name)), kind))
        if not all(np.isfinite(x).all() for x in parts.values()):  # NaN in a kernel is NaN in its scales
            raise CheckpointError(
                f"{reader.folder} holds NaN or infinite numbers in {name}; download or export it again"
            )
        for part, x in parts.items():
            stacks[part][row] = x
    return stacks


def _put(host: dict[str, np.ndarray], placed: Tree) -> dict[str, jax.Array]:
    """Puts whole arrays on the devices, each of which gets its slice."""
    where = tree.flat(placed)
    return {path: jax.make_array_from_callback(x.shape, where[path], x.__getitem__) for path, x in host.items()}


def init(
    path: str, key: Key, mesh: Mesh | None = None, *, dtype=jnp.float32, remat: str = "none"
) -> tuple[Model, Tree]:
    """Makes a fresh model of the shape that `path`/config.json describes, for training from scratch."""
    family, config = read_config(resolve(path))
    mesh = sharding.mesh(devices=jax.devices()[:1]) if mesh is None else mesh
    model = build(config, dtype=dtype, remat=remat, mesh=mesh)
    placed = sharding.shardings(shapes(config), family.rules, mesh)
    return model, jax.jit(model.init, out_shardings=placed)(key)


def fetch(leaf: jax.Array, index: tuple[int, ...], *, transposed: bool, dtype: np.dtype) -> np.ndarray:
    """Brings one layer (and expert) of a stacked leaf, or with no index a whole leaf, to the host."""
    x = sharding.to_host(leaf[index] if index else leaf)
    return (x.T if transposed else x).astype(dtype)


def export(path: str, params: Mapping, *, source: str, shard_gb: float = 5.0, dtype: str | None = None) -> list[Path]:
    """Writes parameters as a Hugging Face checkpoint.

    Args:
      path: the folder to write.
      params: of the model that `source` describes.
      source: the folder or hub name that gives config.json, tokenizer, chat template, generation config; and, if it
        holds weights, their names and what of them this model does not use (a pooler).
      shard_gb: the largest file, in 10^9 bytes.
      dtype: float32, bfloat16 or float16; by default what the config says, else float32.

    Returns:
      the weight files.

    Raises:
      CheckpointError: the disk is full, `source` cannot be read, or a parameter that it describes is not given.

    Example:
      >>> import tempfile, jaxsft
      >>> model, params = load(jaxsft.BASE)
      >>> [file.name for file in export(tempfile.mkdtemp(), params, source=jaxsft.BASE)]
      ['model.safetensors']
    """
    folder, base = Path(path), resolve(source)
    family, config = read_config(base)
    raw = read_json(base / "config.json")
    kind = jnp.dtype(dtype or raw.get("dtype") or raw.get("torch_dtype") or "float32")
    reader = open_weights(base) if has_weights(base) else None
    files = reader.files if reader else {}
    known, out = names.by_address(family, params), []
    if lacking := sorted(set(names.by_address(family, shapes(config))) - set(known), key=str):
        raise CheckpointError(
            f"the parameters lack {lacking[0].path} (layer {lacking[0].layer}), which {source} describes; are kernels "
            "packed? They cannot be exported, but `merge` writes the base's own, with an adapter folded in"
        )
    for name, (address, transposed) in names.places(family, config, files).items():
        if address in known:
            leaf, index = known[address]
            shape = leaf.shape[len(index) :]
            make = lambda leaf=leaf, index=index, t=transposed: fetch(leaf, index, transposed=t, dtype=kind)
            out.append(Tensor(name, shape[::-1] if transposed else shape, kind, make))
    if reader:
        read = reader.read
        apart = [name for name in files if tree.matches(family.unused, name)]
        out += [Tensor(n, reader.shape(n), kind, lambda n=n: read(n).astype(kind)) for n in apart]
    files = write(folder, out, shard_gb=shard_gb)
    parted = {"tie_word_embeddings": False} if config.tied and "head" in params else {}
    _write_config(folder, {**raw, "dtype" if "dtype" in raw else "torch_dtype": kind.name, **parted})
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
    reader = open_weights(source)
    known = names.places(family, config, reader.files)
    new, low = names.by_address(family, trained or {}), names.adapted(family, adapter or {})
    files = {name: name for name in reader.files}  # what is written: what it is read from
    table, output = (names.Address(f"{layer}/table", None) for layer in ("embed", "head"))
    parts = config.tied and (table in low or output in low or output in new)
    if parts:  # else a second copy of the table, where a file has one, follows the first
        head = names.name_of(family, output)[0]
        files[head] = names.stored(family, names.name_of(family, table)[0], reader.files)
        known[head] = names.Place(output, False)
        new = {output: new[table], **new} if table in new else new

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
            if wanted != (old.shape[::-1] if turned else old.shape[-2:]):
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
    kinds = {n: reader.dtype(old, FLOATS if n in known else DTYPES) for n, old in files.items()}
    tensors = [Tensor(n, reader.shape(old), kinds[n], lambda n=n: make(n)) for n, old in files.items()]
    written = write(folder, tensors, shard_gb=shard_gb)
    _write_config(folder, read_json(source / "config.json") | ({"tie_word_embeddings": False} if parts else {}))
    copy_companions(source, folder)
    return written
