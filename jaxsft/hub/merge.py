"""What is written: a model as a checkpoint, and a fine-tuned part merged into its base.

Merging goes over the base's files tensor by tensor: what was not trained is copied as it is, bit by bit.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxsft import lora, sharding, tree
from jaxsft.hub import images, names
from jaxsft.hub.files import (
    DTYPES,
    FLOATS,
    CheckpointError,
    Tensor,
    copy_companions,
    read_json,
    resolve,
    write,
    write_json,
)
from jaxsft.hub.source import has_weights, open_weights, read_config, shapes
from jaxsft.hub.tokenizer import pad_apart
from jaxsft.models import HEADS, TABLES, Family, ModelConfig, VisionConfig


def fetch(leaf: jax.Array, index: tuple[int, ...], *, transposed: bool, dtype: np.dtype) -> np.ndarray:
    """Brings one layer (and expert) of a stacked leaf, or with no index a whole leaf, to the host."""
    x = sharding.to_host(leaf[index] if index else leaf)
    return (x.T if transposed else x).astype(dtype)


def export(
    path: str,
    params: Mapping,
    *,
    source: str,
    shard_gb: float = 5.0,
    dtype: str | None = None,
    classes: Sequence[str] | None = None,
) -> list[Path]:
    """Writes parameters as a Hugging Face checkpoint.

    Args:
      path: the folder to write.
      params: of the model that `source` describes.
      source: the folder or hub name that gives config.json, tokenizer, chat template, generation config; and, if it
        holds weights, their names and what of them this model does not use (a pooler).
      shard_gb: the largest file, in 10^9 bytes.
      dtype: float32, bfloat16 or float16; by default that of each tensor in the source's files, so that what was not
        trained comes out byte for byte; without files what the config says, else float32.
      classes: their names, of a classifier of images; see `merge`.

    Returns:
      the weight files.

    Raises:
      CheckpointError: the disk is full, `source` cannot be read, or a parameter that it describes is not given.

    Example:
      >>> import tempfile, jaxsft
      >>> model, params = jaxsft.load(jaxsft.BASE)
      >>> [file.name for file in export(tempfile.mkdtemp(), params, source=jaxsft.BASE)]
      ['model.safetensors']
    """
    folder, base = Path(path), resolve(source)
    family, config = read_config(base, images.labels_of(params))
    raw = read_json(base / "config.json")
    usual = jnp.dtype(dtype or raw.get("dtype") or raw.get("torch_dtype") or "float32")
    reader = open_weights(base) if has_weights(base) else None
    files = reader.files if reader else {}
    kind_of = lambda name: reader.dtype(name) if reader and name in files and dtype is None else usual
    known, out = names.by_address(family, params), []
    if lacking := sorted(set(names.by_address(family, shapes(config))) - set(known), key=str):
        raise CheckpointError(
            f"the parameters lack {lacking[0].path} (layer {lacking[0].layer}), which {source} describes; are kernels "
            "packed? They cannot be exported, but `merge` writes the base's own, with an adapter folded in"
        )
    for name, (address, transposed) in names.places(family, config, files).items():
        if address in known:
            leaf, index = known[address]
            shape, how = leaf.shape[len(index) :], {"transposed": transposed, "dtype": kind_of(name)}
            make = lambda leaf=leaf, index=index, how=how: fetch(leaf, index, **how)
            out.append(Tensor(name, shape[::-1] if transposed else shape, how["dtype"], make))
    if reader:
        read = reader.read
        floats = lambda name: reader.dtype(name, DTYPES) in FLOATS.values()  # and not a batch norm's count of batches
        kept = lambda name: kind_of(name) if floats(name) else reader.dtype(name, DTYPES)
        apart = [(name, kept(name)) for name in files if tree.matches(family.unused, name)]
        out += [Tensor(n, reader.shape(n), kind, lambda n=n, k=kind: read(n).astype(k)) for n, kind in apart]
    out = _classifying(family, out) if images.classifies(config) else out
    files = write(folder, out, shard_gb=shard_gb)
    changed = {"tie_word_embeddings": False} if config.tied and "head" in params else {}
    said = {**raw, "dtype" if "dtype" in raw else "torch_dtype": usual.name, **changed, **_rows(params, config)}
    _finish(folder, base, _scoring(family, said, config, classes) if config.labels else said)
    return files


def _classifying(family: Family, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors of a classifier of images, by their names there."""
    called = [(images.written(family, one.name), one) for one in tensors]
    return [one._replace(name=name) for name, one in called if name]


def _rows(params: Mapping, config: ModelConfig) -> dict[str, int]:
    """What config.json says of tables with rows of new tokens; nothing where there are none."""
    rows = max([0, *(len(x) for path, x in tree.flat(params).items() if tree.matches(TABLES, path))])
    return {"vocab_size": rows} if rows and rows > config.vocab_size else {}


def _finish(folder: Path, source: Path, config: Mapping) -> None:
    """Writes what lies beside the weights."""
    if jax.process_index() == 0:
        write_json(folder / "config.json", config)
    copy_companions(source, folder)
    pad_apart(folder)  # where it is a reward model


def _head(family: Family, config: ModelConfig, address: names.Address, leaf: jax.Array, dtype: np.dtype) -> Tensor:
    """A tensor of an output layer that the base does not have."""
    name, transposed = names.name_of(family, address)
    shape = (config.labels, config.hidden) if transposed else (config.labels,)
    if leaf.shape != shape[::-1]:
        raise CheckpointError(f"{name!r} was trained with shape {leaf.shape[::-1]}, but the base implies {shape}")
    return Tensor(name, shape, dtype, lambda: fetch(leaf, (), transposed=transposed, dtype=dtype))


def _scoring(family: Family, config: Mapping, shape: ModelConfig, classes: Sequence[str] | None) -> dict:
    """The config.json of a reward model, or of a classifier; labels that the base has a name for keep it."""
    if images.classifies(shape):
        return images.said(family, config, shape.labels, classes)
    known = any(name.endswith("ForSequenceClassification") for name in config.get("architectures") or ())
    labels = {} if known else {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    return {**config, **labels, "architectures": [family.classifier]}


FULL = np.dtype("float32")


def _folded(weight: np.ndarray, low: Mapping[str, tuple], name: str, *, turned: bool) -> np.ndarray:
    """A weight with its adapter folded in, in float32; `turned` where it lies in the file the other way round."""
    leaves = {part: fetch(*leaf, transposed=False, dtype=FULL) for part, leaf in low.items()}
    wanted = (leaves["a"].shape[-2], leaves["b"].shape[-1])
    if wanted != (weight.shape[::-1] if turned else weight.shape[-2:]):
        wanted = wanted[::-1] if turned else wanted
        raise CheckpointError(f"the adapter of {name!r} has shape {wanted}, but the base has {weight.shape}")
    result = lora.adapted(weight.T if turned else weight, leaves)
    return result.T if turned else result


def merge(
    base: str,
    path: str,
    *,
    adapter: Mapping | None = None,
    trained: Mapping | None = None,
    shard_gb: float = 5.0,
    classes: Sequence[str] | None = None,
) -> list[Path]:
    """Writes the base with a fine-tuned part folded in, file by file: W + scale A B in float32, cast once.

    Args:
      base: the checkpoint that was fine-tuned; a folder or a hub name.
      path: the folder to write.
      adapter: a LoRA tree, as `lora.init` makes it.
      trained: parameters that replace the base's; others are copied bit by bit. Tables may have more rows than there.
        With a score among them a language model becomes a reward model: transformers' ...ForSequenceClassification,
        without an output layer, and with a token for padding that ends no text (see `pad_apart`). With a classifier
        among them a model of images becomes transformers' ...ForImageClassification, see `images`.
      shard_gb: the largest file, in 10^9 bytes.
      classes: the names of the classes of images, by their numbers.

    Returns:
      the weight files. Where the output layer was tied to the embedding and one of the two is adapted, or trained
      alone, it gets a tensor of its own, and config.json says so.

    Raises:
      CheckpointError: a weight that the base does not have, or another shape than the base's.

    Example:
      >>> import tempfile, jaxsft
      >>> _, params = jaxsft.load(jaxsft.BASE)
      >>> [file.name for file in merge(jaxsft.BASE, tempfile.mkdtemp(), trained={"norm": params["norm"]})]
      ['model.safetensors']
    """
    folder, source = Path(path), resolve(base)
    if folder.exists() and folder.samefile(source):
        raise CheckpointError(f"{path} is the base itself; choose another folder to merge into")
    family, config = read_config(source, images.labels_of(trained or {}))
    reader, pictures = open_weights(source), isinstance(config, VisionConfig)
    known = names.places(family, config, reader.files)
    new, low = names.by_address(family, trained or {}), names.adapted(family, adapter or {})
    heads = [address for address in new if tree.matches(HEADS, address.path)]
    spare = {copy for copy, _ in family.copies} if config.labels else set()
    # Of images the new layer may have another number of classes, so nothing is written into the old one's place.
    spare |= {name for name, place in known.items() if pictures and place.address in heads}
    files = {name: name for name in reader.files if name not in spare}  # what is written: what it is read from
    table, output = (names.Address(f"{layer}/table", None) for layer in ("embed", "head"))
    parts = config.tied and (table in low or output in low or output in new)
    if parts:  # else a second copy of the table, where a file has one, follows the first
        head = names.name_of(family, output)[0]
        files[head] = names.stored(family, names.name_of(family, table)[0], reader.files)
        known[head] = names.Place(output, False)
        new = {output: new[table], **new} if table in new else new

    grown = _rows(trained or {}, config)

    def shape_of(name: str) -> tuple[int, ...]:
        old = reader.shape(files[name])
        if not (grown and name in known and tree.matches(TABLES, known[name].address.path)):
            return old
        if known[name].address not in new:
            raise CheckpointError(f"new tokens have rows in a table that was trained, and none in {name!r}; train both")
        return grown["vocab_size"], *old[1:]

    def make(name: str) -> np.ndarray:
        if name not in known:
            return reader.read(files[name])
        address, transposed = known[name]
        learned = address in new
        weight = fetch(*new[address], transposed=transposed, dtype=FULL) if learned else reader.read(files[name])
        if weight.shape != shape_of(name):
            had = reader.shape(files[name])
            raise CheckpointError(f"{name!r} was trained with shape {weight.shape}, but {source} has {had}")
        if address in low:
            weight = _folded(weight, low[address], name, turned=transposed or address == output)
        return weight.astype(kinds[name])

    have = {known[name].address for name in files if name in known}
    adds = [address for address in heads if address not in have]
    have |= set(adds)
    if missing := sorted((set(new) | set(low)) - have, key=str):
        raise CheckpointError(
            f"{source} has no {missing[0].path} (layer {missing[0].layer}) to merge into; is it the base?"
        )
    kinds = {n: reader.dtype(old, FLOATS if n in known else DTYPES) for n, old in files.items()}
    tensors = [Tensor(n, shape_of(n), kinds[n], lambda n=n: make(n)) for n in files]
    if adds:  # in the dtype of the others, as whoever loads the folder casts it to one anyway
        kind = reader.dtype(next(name for name in files if name in known))
        tensors += [_head(family, config, address, new[address][0], kind) for address in adds]
    tensors = _classifying(family, tensors) if images.classifies(config) else tensors
    written = write(folder, tensors, shard_gb=shard_gb)
    said = read_json(source / "config.json") | ({"tie_word_embeddings": False} if parts else {}) | grown
    _finish(folder, source, _scoring(family, said, config, classes) if config.labels else said)
    return written
