"""Adapters in PEFT's file format, both ways.

    lora/blocks/0-3/attn/q/a  [4, in, r]   <->   base_model.model.<module of layer 0..3>.lora_A.weight  [r, in]
    lora/blocks/0-3/attn/q/b  [4, r, out]  <->   base_model.model.<module of layer 0..3>.lora_B.weight  [out, r]
    lora/blocks/0-3/attn/q/m  [4, out]     <->   base_model.model.<module of layer 0..3>.lora_magnitude_vector  [out]
    lora/embed/a, b  [V, r], [r, D]        <->   base_model.model.<embedding>.lora_embedding_A, B  [r, V], [D, r]
    params/norm/scale, trained beside it   <->   base_model.model.<module>.weight, and the module in modules_to_save
    a bias, trained without its kernel     <->   base_model.model.<module>.base_layer.bias or .bias, and the key bias

Ranks that differ within a stack are padded with zeros, which never move: where A and B are both zero, so are both
gradients. An export leaves them out again. A0 and B0 are exported as more of A and B, see `lora.folded`.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

from jaxsft import lora, tree
from jaxsft.hub import names
from jaxsft.hub.files import CheckpointError, Reader, Tensor, resolve, write, write_json
from jaxsft.hub.names import Address
from jaxsft.hub.peft_config import CONFIG, CONVERT, Settings, read_settings, to_config
from jaxsft.hub.weights import fetch, on_disk, read_config
from jaxsft.lora import Adapter, LoRA
from jaxsft.models import DecoderConfig, Family

FILE, PICKLE = "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
LINEAR = {"a": "lora_A.weight", "b": "lora_B.weight", "m": "lora_magnitude_vector"}
EMBEDDING = {"a": "lora_embedding_A", "b": "lora_embedding_B", "m": "lora_magnitude_vector"}
PARTS = {name: part for kind in (LINEAR, EMBEDDING) for part, name in kind.items()}
NAME = re.compile(rf"(.+?)\.({'|'.join(map(re.escape, PARTS))}|(?:base_layer\.)?(?:weight|bias))")
EMBED, HEAD = Address("embed/table", None), Address("head/table", None)
FULL = np.dtype("float32")


# ---- out ---------------------------------------------------------------------------------------------------------


def export_adapter(
    path: str, adapter: Mapping, spec: LoRA, *, family: Family, base: str, trained: Mapping | None = None
) -> list[Path]:
    """Writes an adapter folder that PEFT loads.

    Args:
      path: the folder.
      adapter: the LoRA tree; ranks and scales are those of its leaves.
      spec: its dropout and rslora.
      family: of the base, for the names.
      base: the base's folder or hub name, written into the config.
      trained: parameters of the base that trained beside the adapter.

    Raises:
      CheckpointError: an adapter of zeros alone; a weight that trained beside its own adapter.

    Example:
      >>> import tempfile, jaxsft
      >>> from jaxsft import lora, models
      >>> model, params = jaxsft.load(jaxsft.BASE)
      >>> spec = LoRA(rank=2)
      >>> adapter = lora.init(jax.random.key(0), params, spec)
      >>> out = tempfile.mkdtemp()
      >>> [file.name for file in export_adapter(out, adapter, spec, family=models.FAMILIES["llama"], base=jaxsft.BASE)]
      ['adapter_model.safetensors']
    """
    arrays: dict[str, np.ndarray] = {}
    sizes, turned, dora = {}, True, False
    for address, parts in sorted(names.adapted(adapter).items(), key=str):
        leaves = lora.folded({part: fetch(*leaf, transposed=False, dtype=FULL) for part, leaf in parts.items()})
        name, transposed = names.name_of(family, address)
        module, dora = name.removesuffix(".weight"), "m" in leaves
        alive = leaves["a"].any(axis=0) | leaves["b"].any(axis=1)
        alive[:1] |= dora  # what a DoRA without A and B still says is its m
        if alive.any():
            sizes[module] = int(alive.sum()), float(leaves["scale"])
            leaves |= {"a": leaves["a"][:, alive].T, "b": leaves["b"][alive].T}
            named = EMBEDDING if address == EMBED else LINEAR
            arrays |= {f"{PREFIX}{module}.{named[part]}": leaves[part] for part in named if part in leaves}
            turned &= transposed or address in (EMBED, HEAD)
    if not sizes:
        raise CheckpointError("the adapter holds zeros alone, which PEFT has no file for; train it first")
    tensors = [Tensor(name, x.shape, FULL, lambda x=x: x) for name, x in arrays.items()]
    saved, keys = _saved(trained or {}, sizes, family, base)
    folder = Path(path)
    files = write(folder, [*tensors, *saved], shard_gb=float("inf"), single=FILE)
    if jax.process_index() == 0:
        keys |= {"use_dora": dora, "fan_in_fan_out": not turned}
        write_json(folder / CONFIG, to_config(sizes, spec, base=base, **keys))
    return files


def _saved(trained: Mapping, adapted: Mapping, family: Family, base: str) -> tuple[list[Tensor], dict]:
    """The tensors of what trained beside an adapter, and the keys that say so: modules_to_save, bias."""
    new, tied = names.by_address(trained), False
    if EMBED in new and read_config(resolve(base))[1].tied:
        if tied := HEAD not in new:
            new[HEAD] = new[EMBED]  # PEFT keeps both, and the key to tie them
        elif np.array_equal(fetch(*new[HEAD], transposed=False, dtype=FULL), on_disk(base)["embed"]["table"]):
            del new[HEAD]  # the base's, which without that key the output layer of PEFT keeps
    found = {names.name_of(family, address): leaf for address, leaf in new.items()}
    whole = {name.removesuffix(".weight") for name, _ in found if name.endswith(".weight")}
    if twice := sorted(whole & set(adapted)):
        raise CheckpointError(f"{twice[0]}.weight trained beside its own adapter, which PEFT cannot hold; merge it")
    tensors, biases = [], {}
    for (name, transposed), (leaf, row) in sorted(found.items()):
        module, _, kind = name.rpartition(".")
        if kind == "bias" and module not in whole:
            biases[module] = module in adapted
            name = f"{module}.base_layer.bias" if module in adapted else name
        shape = leaf.shape if row is None else leaf.shape[1:]
        make = lambda leaf=leaf, row=row, t=transposed: fetch(leaf, row, transposed=t, dtype=FULL)
        tensors.append(Tensor(PREFIX + name, shape[::-1] if transposed else shape, FULL, make))
    # PEFT saves a module whole: a bias that rested comes from the base.
    kernels = {address.path.removesuffix("kernel") for address in new if address.path.endswith("kernel")}
    if any(name.path == f"{kernel}bias" for name in family.names for kernel in kernels):
        reader, have = Reader(resolve(base)), {name for name, _ in found}
        for name in sorted({f"{module}.bias" for module in whole} & set(reader.files) - have):
            make = lambda name=name: reader.read(name).astype(FULL)
            tensors.append(Tensor(PREFIX + name, reader.shape(name), FULL, make))
    keys = {
        "modules_to_save": sorted(whole - {names.name_of(family, HEAD)[0].removesuffix(".weight")} if tied else whole),
        "ensure_weight_tying": tied,
        "bias": ("lora_only" if all(biases.values()) else "all") if biases else "",
    }
    return tensors, keys


# ---- in ----------------------------------------------------------------------------------------------------------


def load_adapter(path: str, params: Mapping, *, family: Family, config: DecoderConfig) -> Adapter:
    """Reads an adapter folder, written by PEFT or by us, as a tree beside `params`.

    In a stack where only some layers have the adapter the others get a zero one.

    Args:
      path: the folder.
      params: the base's parameters, `hub.on_disk(base)`, or shapes, which do for a plain LoRA of linear layers.
      family, config: of the base.

    Returns:
      lora, for `variables["lora"]`; spec; params, weights that replace the base's (modules_to_save). The leaves are
      numpy arrays. Where PEFT parted a tied output layer from its embedding, params has a `head/table`.

    Raises:
      CheckpointError: an unsupported setting, a tensor of an unknown name, or one that fits no kernel of the base.

    Example:
      >>> import tempfile, jaxsft
      >>> from jaxsft import lora, models
      >>> model, params = jaxsft.load(jaxsft.BASE)
      >>> spec, out, llama = LoRA(rank=2), tempfile.mkdtemp(), models.FAMILIES["llama"]
      >>> adapter = lora.init(jax.random.key(0), params, spec)
      >>> _ = export_adapter(out, adapter, spec, family=llama, base=jaxsft.BASE)
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
    base, reader = _Base(params, folder), Reader(folder, FILE)
    low: dict[Address, dict[str, np.ndarray]] = {}
    modules: dict[Address, str] = {}
    saved: dict[Address, np.ndarray] = {}
    copies: dict[Address, np.ndarray] = {}  # PEFT writes the tables that it adapted along
    known = names.places(family, config)
    for name in reader.files:
        match = NAME.fullmatch(name.removeprefix(PREFIX))
        module, part = match.groups() if match else ("", "")
        place = known.get(f"{module}.{'bias' if part.endswith('bias') else 'weight'}")
        if place is None or place.address not in base.where or not _fits(part, place.address):
            raise CheckpointError(f"{folder / FILE} has {name!r}, which fits no kernel of the base")
        address, transposed, value = place.address, place.transposed, reader.read(name).astype(FULL)
        kind, shape = PARTS.get(part), base.shape(address)
        if kind:
            rank, (n_in, n_out) = settings.of(module).rank, shape[::-1] if address == HEAD else shape
            shape = {"a": (n_in, rank), "b": (rank, n_out), "m": (n_out,)}[kind]
        turned = kind in ("a", "b") or (transposed and not kind)
        wanted = shape[::-1] if turned else shape
        if value.shape != wanted:
            raise CheckpointError(f"{name!r} in {folder / FILE} has shape {value.shape}; {wanted} was expected")
        if not np.isfinite(value).all():
            raise CheckpointError(f"{name!r} in {folder / FILE} holds NaN or infinite numbers")
        value = value.T if turned else value
        if kind:
            low.setdefault(address, {})[kind], modules[address] = value, module
        elif part == "base_layer.weight":
            copies[EMBED if base.tied else address] = value
        else:
            saved[address] = value
    wanted = {"a", "b"} | ({"m"} if settings.spec.dora else set())
    if wrong := [(modules[address], set(parts) ^ wanted) for address, parts in low.items() if set(parts) != wanted]:
        module, parts = wrong[0]
        half = "a half" if parts & {"a", "b"} else "lora_magnitude_vector"
        if parts == {"m"} and not settings.spec.dora:
            raise CheckpointError(f"{folder / FILE} has {module}.{LINEAR['m']}, but {CONFIG} does not set use_dora")
        raise CheckpointError(f"{folder / FILE} lacks {half} of {module}; export it again")
    if not low:
        raise CheckpointError(f"{folder / FILE} lacks a half of everything; export it again")
    if base.tied:
        if settings.spec.init in lora.STARTS and HEAD in low:
            raise CheckpointError(
                f"{folder} starts at {settings.spec.init} of an output layer that is the embedding, which PEFT changes "
                f"with it; {CONVERT}"
            )
        if settings.tied:
            saved.pop(HEAD, None)  # the embedding once more
        elif EMBED in saved and HEAD not in saved:
            saved[HEAD] = base.value(EMBED, "for the output layer that it was tied to")
    copies = {address: x for address, x in copies.items() if base.differs(address, x)}
    return Adapter(_stack(low, modules, settings, base), settings.spec, _replace(copies | saved, base))


def _fits(part: str, address: Address) -> bool:
    """Whether PEFT has such a tensor for a weight: other names for embeddings, whole tables along with the adapted."""
    if part == "base_layer.weight":
        return address in (EMBED, HEAD)
    return part not in PARTS or part in (EMBEDDING if address == EMBED else LINEAR).values()


class _Base:
    """Where each weight of the base lies, its shape, and, where they are at hand, its values."""

    def __init__(self, params: Mapping, folder: Path):
        self.leaves, self.folder = tree.flat(params), folder
        self.where: dict[Address, tuple[str, int | None]] = {}
        self.rows: dict[str, list[Address]] = {}
        for path in self.leaves:
            plain, layers = names.unstacked(path)
            self.rows[path] = [Address(plain, layer) for layer in layers or [None]]
            for row, address in enumerate(self.rows[path]):
                self.where[address] = (path, None if layers is None else row)
        self.tied = HEAD not in self.where and EMBED in self.where
        if self.tied:
            self.where[HEAD], self.rows[HEAD.path] = (HEAD.path, None), [HEAD]

    def leaf(self, address: Address):
        return self.leaves[EMBED.path if self.tied and address == HEAD else self.where[address][0]]

    def shape(self, address: Address) -> tuple[int, ...]:
        return self.leaf(address).shape[0 if self.where[address][1] is None else 1 :]

    def value(self, address: Address, why: str) -> np.ndarray:
        if isinstance(self.leaf(address), jax.ShapeDtypeStruct):
            raise CheckpointError(
                f"{self.folder} needs {address.path} of the base {why}; give load_adapter the parameters or "
                "hub.on_disk(base) instead of shapes"
            )
        return fetch(self.leaf(address), self.where[address][1], transposed=False, dtype=FULL)

    def matrix(self, address: Address, why: str) -> np.ndarray:
        """As [in, out]."""
        return self.value(address, why).T if address == HEAD else self.value(address, why)

    def differs(self, address: Address, value: np.ndarray) -> bool:
        if isinstance(self.leaf(address), jax.ShapeDtypeStruct):
            return True  # for all we know
        return not np.array_equal(self.value(address, ""), value)


def _stack(low: Mapping, modules: Mapping[Address, str], settings: Settings, base: _Base) -> tree.Tree:
    """The leaves of an adapter from its parts by address."""
    leaves: dict[str, np.ndarray] = {}
    for path in dict.fromkeys(base.where[address][0] for address in low):
        layer, rows = path.rpartition("/")[0], base.rows[path]
        stack = () if base.where[rows[0]][1] is None else (len(rows),)
        ranks = [low[address]["a"].shape[1] for address in rows if address in low]
        n_in, n_out = base.shape(rows[0])[::-1] if path == HEAD.path else base.shape(rows[0])
        shapes = {"a": (n_in, max(ranks)), "b": (max(ranks), n_out), "scale": ()}
        starts = settings.spec.init in lora.STARTS and layer != "embed"
        shapes |= {"a0": shapes["a"], "b0": shapes["b"]} if starts else {}
        shapes |= {"m": (n_out,)} if settings.spec.dora else {}
        whole = {part: np.zeros((*stack, *shape), FULL) for part, shape in shapes.items()}
        for row, address in enumerate(rows):
            own = dict(low.get(address, {}))
            scale = settings.scale(modules[address]) if own else lora.scale(settings.spec, layer)
            if own and starts:
                kernel = base.matrix(address, f"for what {settings.spec.init} started at")
                own["a0"], own["b0"] = lora.STARTS[settings.spec.init](kernel, own["a"].shape[1], scale)
            if not own and settings.spec.dora:
                own["m"] = np.linalg.norm(base.matrix(address, "for a layer without an adapter"), axis=0)
            for part, value in (own | {"scale": scale}).items():
                size = tuple(map(slice, np.shape(value)))
                whole[part][(row, *size) if stack else size] = value
        leaves |= {f"{layer}/{part}": leaf for part, leaf in whole.items()}
    return tree.nest(leaves)


def _replace(saved: Mapping[Address, np.ndarray], base: _Base) -> tree.Tree:
    """Whole leaves of the weights that replace the base's; layers of a stack that were not saved are the base's."""
    leaves = {}
    for path in dict.fromkeys(base.where[address][0] for address in saved):
        value = lambda a: saved[a] if a in saved else base.value(a, "for layers that are not saved")
        rows = [value(address) for address in base.rows[path]]
        leaves[path] = rows[0] if base.where[base.rows[path][0]][1] is None else np.stack(rows)
    return tree.nest(leaves)
