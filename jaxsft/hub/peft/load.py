"""Reading an adapter folder."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from jaxsft import lora, tree
from jaxsft.hub import names
from jaxsft.hub.files import CheckpointError, Reader
from jaxsft.hub.names import SCORE, Address
from jaxsft.hub.peft.base import Base
from jaxsft.hub.peft.config import CONVERT, Settings, read_settings
from jaxsft.hub.peft.names import (
    CONFIG,
    EMBED,
    EMBEDDING,
    FILE,
    FULL,
    HEAD,
    LINEAR,
    NAME,
    PARTS,
    PICKLE,
    PREFIX,
    SCORES,
    TOKENS,
    WRAPPED,
)
from jaxsft.lora import Adapter
from jaxsft.models import DecoderConfig, Family, ModelConfig, VisionConfig, with_labels
from jaxsft.tree import Tree


class Parts(NamedTuple):
    """The tensors of a folder by the address of the weight that they belong to, as ours are turned."""

    low: dict[Address, dict[str, np.ndarray]]  # A, B and m
    modules: dict[Address, str]  # PEFT's names of those
    saved: dict[Address, np.ndarray]  # what replaces the base's
    copies: dict[Address, np.ndarray]  # the tables that were adapted, which PEFT writes along
    tokens: dict[Address, tuple[tuple[int, ...], np.ndarray]]  # rows of a table that replace the base's


def load_adapter(path: str, params: Mapping, *, family: Family, config: ModelConfig) -> Adapter:
    """Reads an adapter folder, written by PEFT or by us, as a tree beside `params`.

    In a stack where only some layers have the adapter the others get a zero one.

    Args:
      path: the folder.
      params: the base's parameters, `hub.on_disk(base)`, or shapes, which do for a plain LoRA of linear layers.
      family, config: of the base.

    Returns:
      lora, for `variables["lora"]`; spec; params, weights that replace the base's (modules_to_save). The leaves are
      numpy arrays. Where PEFT parted a tied output layer from its embedding, params has a `head/table`; of a reward
      model's adapter (task_type SEQ_CLS) it has the `score/kernel`, though the base may be a language model; of images
      the `classifier`, though the base may have none, or one of other classes.

    Raises:
      CheckpointError: an unsupported setting, a tensor of an unknown name, or one that fits no kernel of the base.

    Example:
      >>> import tempfile, jax, jaxsft
      >>> from jaxsft import lora, models
      >>> model, params = jaxsft.load(jaxsft.BASE)
      >>> spec, out, llama = jaxsft.LoRA(rank=2), tempfile.mkdtemp(), models.FAMILIES["llama"]
      >>> adapter = lora.init(jax.random.key(0), params, spec)
      >>> _ = jaxsft.export_adapter(out, adapter, spec, family=llama, base=jaxsft.BASE)
      >>> again = load_adapter(out, params, family=llama, config=model.config)
      >>> again.spec.rank, tree.flat(again.lora).keys() == tree.flat(adapter).keys(), again.params
      (2, True, {})
    """
    folder = Path(path)
    if not folder.is_dir():
        raise CheckpointError(f"no adapter folder {path!r}; give one with {CONFIG} and {FILE}")
    settings = read_settings(folder)
    if (folder / PICKLE).is_file() and not (folder / FILE).is_file():
        raise CheckpointError(
            f"{folder} has {PICKLE}, a pickle, which runs what it holds; load it in PEFT and let save_pretrained write "
            f"{FILE}"
        )
    if settings.task == SCORES:
        config = _scoring(folder, family, config)
        if "score" not in params:
            params = {**params, "score": {"kernel": jax.ShapeDtypeStruct((config.hidden, config.labels), FULL)}}
    reader = Reader(folder, FILE)
    if isinstance(config, VisionConfig):
        config, params = _classifying(reader, family, config, params)
    base = Base(params, folder, family)
    named = _names(reader)
    modules = {module for module, _ in named.values()}
    # An adapter of the output layer is none of the embedding, tied or not.
    alone = dataclasses.replace(config, tied=False) if isinstance(config, DecoderConfig) else config
    known = names.places(family, alone, {f"{module}.{part}" for module in modules for part in ("weight", "bias")})
    for name, (module, part) in named.items():
        place = known.get(f"{module}.weight")
        if place and place.address in base.tables and part in ("weight", "base_layer.weight"):
            base.grow(reader.shape(name)[0])
    parts = _read(reader, named, known, settings, base)
    _complain(folder / FILE, parts, known, settings, base)
    return Adapter(_stack(parts, settings, base), settings.spec, _replace(_whole(parts, settings, base), base))


def _scoring(folder: Path, family: Family, config: ModelConfig) -> ModelConfig:
    try:
        return with_labels(family, config, 1)
    except ValueError as error:
        raise CheckpointError(f"{folder / CONFIG} has task_type {SCORES}, a reward model: {error}") from error


def _classifying(reader: Reader, family: Family, config: ModelConfig, params: Mapping) -> tuple[ModelConfig, Mapping]:
    """The base with a classifier of as many classes as the folder's has, where it has one."""
    name = PREFIX + names.name_of(family, Address("classifier/kernel", None))[0]
    if name not in reader.files:
        return config, params
    labels = reader.shape(name)[0]
    config = with_labels(family, config, labels)
    shapes = {"kernel": (config.hidden, labels), "bias": (labels,)}
    return config, {**params, "classifier": {k: jax.ShapeDtypeStruct(s, FULL) for k, s in shapes.items()}}


def _names(reader: Reader) -> dict[str, tuple[str, str]]:
    """The tensors of a folder, each with the module it is of and what it is; two empty words for what is not known."""
    found = {}
    for name in reader.files:
        again = WRAPPED.fullmatch(name)
        if not (again and ".".join(again.groups()) in reader.files):
            match = NAME.fullmatch(name.removeprefix(PREFIX).replace(".token_adapter.", "."))
            found[name] = match.groups() if match else ("", "")
    return found


def _read(reader: Reader, named: Mapping, known: Mapping[str, names.Place], settings: Settings, base: Base) -> Parts:
    """Reads every tensor and finds where it belongs; a name or a shape that belongs nowhere raises."""
    folder, parts = reader.folder, Parts({}, {}, {}, {}, {})
    for name, (module, part) in named.items():
        place = known.get(f"{module}.{'bias' if part.endswith('bias') else 'weight'}")
        if place is None or place.address not in base.where or not _fits(part, place.address):
            raise CheckpointError(f"{folder / FILE} has {name!r}, which fits no kernel of the base")
        address, transposed = place
        value = reader.read(name).astype(FULL)
        kind, shape = PARTS.get(part), base.shape(address)
        if kind:
            rank, (n_in, n_out) = settings.of(module).rank, shape[::-1] if address == HEAD else shape
            shape = {"a": (n_in, rank), "b": (rank, n_out), "m": (n_out,)}[kind]
        rows = settings.tokens_of(module)
        if part == TOKENS and base.tied and not rows:
            continue  # the embedding's once more
        shape = (len(rows), *shape[1:]) if part == TOKENS else shape
        turned = kind in ("a", "b") or (transposed and not kind)
        wanted = shape[::-1] if turned else shape
        if value.shape != wanted:
            raise CheckpointError(f"{name!r} in {folder / FILE} has shape {value.shape}; {wanted} was expected")
        if not np.isfinite(value).all():
            raise CheckpointError(f"{name!r} in {folder / FILE} holds NaN or infinite numbers")
        value = value.T if turned else value
        if kind:
            parts.low.setdefault(address, {})[kind], parts.modules[address] = value, module
        elif part == "base_layer.weight":
            parts.copies[EMBED if base.tied else address] = value
        elif part == TOKENS:
            parts.tokens[EMBED if base.tied else address] = rows, value
        elif not np.array_equal(parts.saved.setdefault(address, value), value):
            raise CheckpointError(
                f"{folder / FILE} has {name!r}, and other values of the same weight, which this model has once"
            )
    return parts


def _fits(part: str, address: Address) -> bool:
    """Whether PEFT has such a tensor for a weight: other names for embeddings, whole tables along with the adapted."""
    if part in ("base_layer.weight", TOKENS):
        return address in (EMBED, HEAD)
    if address == SCORE:
        return part == "weight"
    return part not in PARTS or part in (EMBEDDING if address == EMBED else LINEAR).values()


def _complain(file: Path, parts: Parts, known: Mapping, settings: Settings, base: Base) -> None:
    """Refuses a folder whose tensors are not all those, and no others, that its configuration implies."""
    dora, start = settings.spec.dora, settings.spec.init
    wanted = {"a", "b", "m"} if dora else {"a", "b"}
    for address, own in parts.low.items():
        module, wrong = parts.modules[address], set(own) ^ wanted
        if wrong & {"a", "b"}:
            raise CheckpointError(f"{file} lacks a half of {module}; export it again")
        if wrong and dora:
            raise CheckpointError(f"{file} lacks {LINEAR['m']} of {module}, though {CONFIG} sets use_dora")
        if wrong:
            raise CheckpointError(f"{file} has {module}.{LINEAR['m']}, but {CONFIG} does not set use_dora")
    if not parts.low:
        raise CheckpointError(f"{file} lacks a half of everything; export it again")
    for name, place in known.items():
        whole = name.rpartition(".")[0].endswith(settings.saved) and place.address in base.where
        if whole and place.address not in parts.saved:
            raise CheckpointError(
                f"{file} lacks {name!r}, which {CONFIG} counts among modules_to_save; export it again"
            )
    if settings.task == SCORES and SCORE not in parts.saved:
        raise CheckpointError(
            f"{file} lacks the score, though {CONFIG} has task_type {SCORES}; export it again with modules_to_save "
            "[score]"
        )
    if settings.tokens and not parts.tokens:
        raise CheckpointError(f"{file} lacks {TOKENS}, though {CONFIG} sets trainable_token_indices; export it again")
    if base.size:
        alone = settings.task == SCORES or (base.tied and (settings.tied or EMBED not in parts.saved))
        for address in base.tables:
            if not (alone and address == HEAD) and address not in {**parts.saved, **parts.copies}:
                raise CheckpointError(
                    f"{file} has {base.size} rows for tokens in one table, and no {address.path}, which needs as many; "
                    "PEFT writes it with save_pretrained(..., save_embedding_layers=True), or in modules_to_save"
                )
    if base.size and start in lora.STARTS and HEAD in parts.low:
        raise CheckpointError(f"{file} starts at {start} of an output layer that has grown since; {CONVERT}")
    tables = [parts.saved[address] for address in (EMBED, HEAD) if address in parts.saved]
    if base.tied and settings.tied and tables and (len(tables) == 1 or (tables[0] != tables[1]).any()):
        raise CheckpointError(f"{file} has two tables, though {CONFIG} sets ensure_weight_tying; export it again")
    if base.tied and start in lora.STARTS and HEAD in parts.low:
        raise CheckpointError(
            f"{file} starts at {start} of an output layer that is the embedding, which PEFT changes with it; {CONVERT}"
        )


def _stack(parts: Parts, settings: Settings, base: Base) -> Tree:
    """The leaves of an adapter."""
    leaves, start = {}, settings.spec.init
    for path in dict.fromkeys(base.where[address][0] for address in parts.low):
        layer, rows = path.rpartition("/")[0], base.rows[path]
        stack = base.stack(path)
        rank = max(parts.low[address]["a"].shape[1] for address in rows if address in parts.low)
        n_in, n_out = base.shape(rows[0])[::-1] if path == HEAD.path else base.shape(rows[0])
        shapes = {"a": (n_in, rank), "b": (rank, n_out), "scale": ()}
        starts = start in lora.STARTS and layer != "embed"
        shapes |= {"a0": (n_in, rank), "b0": (rank, n_out)} if starts else {}
        shapes |= {"m": (n_out,)} if settings.spec.dora else {}
        whole = {part: np.zeros((*stack, *shape), FULL) for part, shape in shapes.items()}
        for address in rows:
            own = dict(parts.low.get(address, {}))
            scale = settings.scale(parts.modules[address]) if own else lora.scale(settings.spec, layer)
            if own and starts:
                kernel = base.matrix(address, f"for what {start} started at")
                own["a0"], own["b0"] = map(np.asarray, lora.STARTS[start](kernel, own["a"].shape[1], scale))
            if not own and settings.spec.dora:
                own["m"] = np.linalg.norm(base.matrix(address, "for a layer without an adapter"), axis=0)
            for part, value in (own | {"scale": scale}).items():
                size = tuple(map(slice, np.shape(value)))
                whole[part][(*base.where[address][1], *size)] = value
        leaves |= {f"{layer}/{part}": leaf for part, leaf in whole.items()}
    return tree.nest(leaves)


def _whole(parts: Parts, settings: Settings, base: Base) -> dict[Address, np.ndarray]:
    """The weights that replace the base's: what was saved, rows put into a table, adapted tables that are others."""
    saved = dict(parts.saved)
    both = EMBED in saved and HEAD in saved
    if base.tied and (settings.tied or (both and np.array_equal(saved[EMBED], saved[HEAD]))):
        saved.pop(HEAD, None)  # the embedding once more
    elif base.tied and EMBED in saved and HEAD not in saved:
        saved[HEAD] = base.value(EMBED, "for the output layer that it was tied to")
    for address, (rows, values) in parts.tokens.items():
        there = address in parts.copies
        saved[address] = np.array(parts.copies[address] if there else base.value(address, "for the other tokens' rows"))
        saved[address][list(rows)] = values
    return {address: x for address, x in parts.copies.items() if base.differs(address, x)} | saved


def _replace(saved: Mapping[Address, np.ndarray], base: Base) -> Tree:
    """Whole leaves of the weights that replace the base's; layers of a stack that were not saved are the base's."""
    leaves = {}
    for path in dict.fromkeys(base.where[address][0] for address in saved):
        value = lambda a: saved[a] if a in saved else base.value(a, "for layers that are not saved")
        rows = [value(address) for address in base.rows[path]]
        leaves[path] = np.stack(rows).reshape(*base.stack(path), *rows[0].shape)
    return tree.nest(leaves)
