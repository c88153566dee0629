"""LoRA adapters in PEFT's file format, both ways.

    lora/blocks/0-3/attn/q/a  [4, in, r]   <->   base_model.model.<module of layer 0..3>.lora_A.weight  [r, in]
    lora/blocks/0-3/attn/q/b  [4, r, out]  <->   base_model.model.<module of layer 0..3>.lora_B.weight  [out, r]

A folder that needs something we do not do (DoRA, trained biases, ...) is refused by the name of the key.
"""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

from jaxsft import tree
from jaxsft.hub import names
from jaxsft.hub.files import CheckpointError, Reader, Tensor, read_json, write, write_json
from jaxsft.hub.weights import fetch
from jaxsft import lora
from jaxsft.models import DecoderConfig, Family
from jaxsft.tree import Tree

FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
READ = {"peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "init_lora_weights"}
PLAIN = (None, True, False, "gaussian", "eva")  # initialisations that leave the base as it is; PiSSA and others do not
# How the adapter was made or found its layers; what it computes does not depend on these.
NEUTRAL = frozenset(
    "auto_mapping base_model_name_or_path corda_config ensure_weight_tying eva_config "
    "exclude_modules inference_mode layers_pattern layers_to_transform loftq_config megatron_config "
    "megatron_core peft_version qalora_group_size revision runtime_config task_type".split()
)


def export_adapter(path: str, adapter: Mapping, spec: LoRA, *, family: Family, base: str) -> list[Path]:
    """Writes an adapter folder that PEFT loads.

    Args:
      path: the folder.
      adapter: the LoRA tree.
      spec: its rank, alpha, dropout, rslora.
      family: of the base, for the names.
      base: the base's folder or hub name, written into the config.

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
    tensors, modules = [], []
    for (where, layer), (leaf, row) in sorted(names.by_address(adapter).items(), key=str):
        module, part = where.rsplit("/", 1)
        if part == "scale":
            continue
        name = next(n.hf for n in family.names if n.path == f"{module}/kernel")
        module = name.format(layer=layer).removesuffix(".weight")
        modules.append(module)
        shape = leaf.shape if row is None else leaf.shape[1:]
        make = lambda leaf=leaf, row=row: fetch(leaf, row, transposed=True, dtype=np.dtype("float32"))
        full = f"{PREFIX}{module}.lora_{part.upper()}.weight"
        tensors.append(Tensor(full, shape[::-1], np.dtype("float32"), make))
    folder = Path(path)
    files = write(folder, tensors, shard_gb=float("inf"), single=FILE)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": spec.rank,
        "lora_alpha": spec.alpha,
        "lora_dropout": spec.dropout,
        "use_rslora": spec.rslora,
        "target_modules": sorted(set(modules)),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    if jax.process_index() == 0:
        write_json(folder / CONFIG, config)
    return files


def read_spec(folder: Path) -> LoRA:
    """Reads `adapter_config.json`.

    Raises:
      CheckpointError: no LoRA, or a setting that is not supported.
    """
    config = read_json(folder / CONFIG)
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{folder / CONFIG} has peft_type {config.get('peft_type')!r}; only LORA is supported")
    for key, value in config.items():
        other = key not in READ | NEUTRAL and value not in (None, False, "none", [], {})
        if other or (key == "init_lora_weights" and value not in PLAIN):
            raise CheckpointError(f"{folder / CONFIG} sets {key!r} to {value!r}, which is not supported")
    return LoRA(
        rank=config.get("r", 8),
        alpha=float(config.get("lora_alpha", 8)),
        dropout=float(config.get("lora_dropout", 0.0)),
        rslora=bool(config.get("use_rslora", False)),
    )


def load_adapter(path: str, params: Mapping, *, family: Family, config: DecoderConfig) -> tuple[Tree, LoRA]:
    """Reads an adapter folder, written by PEFT or by us, as a tree beside `params` (arrays or shapes).

    In a stack where only some layers have the adapter the others get a zero one.

    Returns:
      (adapter, spec); the leaves are numpy arrays, which `variables["lora"]` takes as they are.

    Raises:
      CheckpointError: an unsupported setting, a tensor of an unknown name, or one that fits no kernel of the base.

    Example:
      >>> import tempfile, jaxsft
      >>> from jaxsft import lora, models
      >>> model, params = jaxsft.load(jaxsft.BASE)
      >>> spec, out, llama = LoRA(rank=2), tempfile.mkdtemp(), models.FAMILIES["llama"]
      >>> adapter = lora.init(jax.random.key(0), params, spec)
      >>> _ = export_adapter(out, adapter, spec, family=llama, base=jaxsft.BASE)
      >>> again, found = load_adapter(out, params, family=llama, config=model.config)
      >>> found.rank, tree.flat(again).keys() == tree.flat(adapter).keys()
      (2, True)
    """
    folder = Path(path)
    if not folder.is_dir():
        raise CheckpointError(f"no adapter folder {path!r}; give one with {CONFIG} and {FILE}")
    spec, reader = read_spec(folder), Reader(folder, FILE)
    known, kernels = names.places(family, config), tree.flat(params)
    stacks = {}
    for path_ in kernels:
        plain, layers = names.unstacked(path_)
        stacks |= {names.Address(plain, layer): path_ for layer in layers or [None]}
    leaves: dict[str, np.ndarray] = {}
    for name in reader.files:
        module, _, part = name.removeprefix(PREFIX).partition(".lora_")
        place = known.get(f"{module}.weight")
        if part not in ("A.weight", "B.weight") or place is None or place.address not in stacks:
            raise CheckpointError(f"{folder / FILE} has {name!r}, which fits no kernel of the base")
        stack = stacks[place.address]
        _, layers = names.unstacked(stack)
        shape, value = kernels[stack].shape, reader.read(name).astype(np.float32).T
        wanted = (shape[-2], spec.rank) if part[0] == "A" else (spec.rank, shape[-1])
        if value.shape != wanted:
            raise CheckpointError(f"{name!r} in {folder / FILE} has shape {value.T.shape}; {wanted[::-1]} was expected")
        if not np.isfinite(value).all():
            raise CheckpointError(f"{name!r} in {folder / FILE} holds NaN or infinite numbers")
        leaf = stack.removesuffix("kernel") + part[0].lower()
        row = () if layers is None else layers.index(place.address.layer or 0)
        leaves.setdefault(leaf, np.zeros((*shape[:-2], *wanted), np.float32))[row] = value
        leaves.setdefault(stack.removesuffix("kernel") + "scale", np.full(shape[:-2], scale(spec), np.float32))
    halves = Counter(name.partition(".lora_")[0] for name in reader.files)
    alone = [module for module, count in halves.items() if count != 2]
    if alone or not leaves:
        raise CheckpointError(f"{folder / FILE} lacks a half of {alone[0] if alone else 'everything'}; export it again")
    return tree.nest(leaves), spec
