"""Writing an adapter folder."""

from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

from jaxsft import lora
from jaxsft.hub import names
from jaxsft.hub.disk import on_disk
from jaxsft.hub.files import CheckpointError, Reader, Tensor, resolve, write, write_json
from jaxsft.hub.merge import fetch
from jaxsft.hub.names import SCORE
from jaxsft.hub.peft.config import to_config
from jaxsft.hub.peft.names import CONFIG, EMBED, EMBEDDING, FILE, FULL, HEAD, LINEAR, PREFIX, SCORES
from jaxsft.hub.source import read_config
from jaxsft.lora import LoRA
from jaxsft.models import EncoderConfig, Family, ModelConfig, VisionConfig


def export_adapter(
    path: str,
    adapter: Mapping,
    spec: LoRA,
    *,
    family: Family,
    base: str,
    trained: Mapping | None = None,
    config: ModelConfig | None = None,
) -> list[Path]:
    """Writes an adapter folder that PEFT loads.

    Args:
      path: the folder.
      adapter: the LoRA tree; ranks and scales are those of its leaves.
      spec: its dropout and rslora.
      family: of the base, for the names.
      base: the base's folder or hub name, written into the config.
      trained: parameters of the base that trained beside the adapter. A score makes it the adapter of a reward model,
        PEFT's task SEQ_CLS.
      config: the base's; an encoder without a head needs it, as transformers' modules then lack the family's prefix,
        and a reward model whose score did not train: PEFT wants it all the same, and it is taken from the base.

    Raises:
      CheckpointError: an adapter of zeros alone, of experts that lie in one tensor, or of a kernel that is two modules;
        a weight that trained beside its own adapter, or as the embedding of an encoder.

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
    sizes, turned, kinds = {}, True, set()
    bare = family.prefix if _headless(config, trained or {}) else ""
    for address, parts in sorted(names.adapted(family, adapter).items(), key=str):
        leaves = lora.folded({part: fetch(*leaf, transposed=False, dtype=FULL) for part, leaf in parts.items()})
        name, transposed = names.name_of(family, address)
        named = names.module(family, name.removesuffix(".weight"))
        module, kinds = named.removeprefix(bare), kinds | {"m" in leaves}
        if leaves["a"].ndim > 2:
            raise CheckpointError(
                f"{name!r} holds all experts in one tensor, and PEFT has no file for an adapter of each; merge it, or "
                "leave experts out of tuning.lora.targets"
            )
        if address.path == "blocks/swiglu/gate_up/kernel":
            raise CheckpointError(
                f"{name!r} is two modules in transformers, and PEFT has no file for one adapter of both; merge it, or "
                "leave gate_up out of tuning.lora.targets"
            )
        alive = leaves["a"].any(axis=0) | leaves["b"].any(axis=1)
        alive[:1] |= "m" in leaves  # what a DoRA without A and B still says
        if alive.any():
            sizes[module] = int(alive.sum()), float(leaves["scale"])
            leaves |= {"a": leaves["a"][:, alive].T, "b": leaves["b"][alive].T}
            tags = EMBEDDING if address == EMBED else LINEAR
            arrays |= {f"{PREFIX}{module}.{tags[part]}": leaves[part] for part in tags if part in leaves}
            turned &= transposed or address in (EMBED, HEAD)
    if not sizes:
        raise CheckpointError("the adapter holds zeros alone, which PEFT has no file for; train it first")
    if len(kinds) > 1:
        raise CheckpointError("some layers of the adapter are DoRA and some are not, which PEFT cannot hold; merge it")
    tensors = [Tensor(name, x.shape, FULL, lambda x=x: x) for name, x in arrays.items()]
    pictures = isinstance(config, VisionConfig)
    scores = "score" in (trained or {}) or (config is not None and config.labels > 0 and not pictures)
    if scores and not family.classifier:
        raise CheckpointError("transformers has no reward model of this family, so PEFT could not load its adapter")
    whole = _with_score(trained or {}, base) if scores else trained or {}
    saved, keys = _saved(whole, sizes, family, base, bare)
    folder = Path(path)
    files = write(folder, [*tensors, *saved], shard_gb=float("inf"), single=FILE)
    if jax.process_index() == 0:
        keys |= {"use_dora": True in kinds, "fan_in_fan_out": not turned}
        write_json(folder / CONFIG, to_config(sizes, spec, base=base, task=SCORES if scores else family.task, **keys))
    return files


def _headless(config: ModelConfig | None, trained: Mapping) -> bool:
    """Whether transformers' model has no output layer, and its modules no prefix."""
    if isinstance(config, VisionConfig):
        return not config.labels and "classifier" not in trained
    return isinstance(config, EncoderConfig) and not config.mlm


def _with_score(trained: Mapping, base: str) -> Mapping:
    """What trained, and the base's own score where that did not."""
    if "score" in trained:
        return trained
    params = on_disk(base)
    if "score" not in params:
        raise CheckpointError(f"neither what trained nor {base} has a score; give it among `trained`")
    return {**trained, "score": params["score"]}


def _saved(trained: Mapping, adapted: Mapping, family: Family, base: str, bare: str) -> tuple[list[Tensor], dict]:
    """The tensors of what trained beside an adapter, and the keys that say so: modules_to_save, bias."""
    new, tied = names.by_address(family, trained), False
    headed = any(name.path == HEAD.path for name in family.names)
    if EMBED in new and not headed and not bare:
        raise CheckpointError(
            "the embedding trained, which is the output layer of an encoder as well, and PEFT cannot hold that; merge "
            "it, with export.adapter false"
        )
    if EMBED in new and headed and SCORE not in new and read_config(resolve(base))[1].tied:
        if tied := HEAD not in new:
            new[HEAD] = new[EMBED]  # PEFT keeps both, and the key to tie them
        elif np.array_equal(fetch(*new[HEAD], transposed=False, dtype=FULL), on_disk(base)["embed"]["table"]):
            del new[HEAD]  # the base's, which without that key the output layer of PEFT keeps
    found = {}
    for address, leaf in new.items():
        name, transposed = names.name_of(family, address)
        found[names.module(family, name).removeprefix(bare), transposed] = leaf
    whole = {name.removesuffix(".weight") for name, _ in found if name.endswith(".weight")}
    if twice := sorted(whole & set(adapted)):
        raise CheckpointError(f"{twice[0]}.weight trained beside its own adapter, which PEFT cannot hold; merge it")
    tensors, biases = [], {}
    for (name, transposed), (leaf, index) in sorted(found.items(), key=lambda item: item[0]):
        module, _, kind = name.rpartition(".")
        if kind == "bias" and module not in whole:
            biases[module] = module in adapted
            name = f"{module}.base_layer.bias" if module in adapted else name
        shape = leaf.shape[len(index) :]
        make = lambda leaf=leaf, index=index, t=transposed: fetch(leaf, index, transposed=t, dtype=FULL)
        tensors.append(Tensor(PREFIX + name, shape[::-1] if transposed else shape, FULL, make))
    # PEFT saves a module whole: a bias that rested comes from the base.
    kernels = {address.path.removesuffix("kernel") for address in new if address.path.endswith("kernel")}
    if any(name.path == f"{kernel}bias" for name in family.names for kernel in kernels):
        reader, have = Reader(resolve(base)), {name for name, _ in found}
        files = {names.module(family, name): name for name in reader.files}
        for name in sorted({f"{module}.bias" for module in whole} & set(files) - have):
            make = lambda name=files[name]: reader.read(name).astype(FULL)
            tensors.append(Tensor(PREFIX + name, reader.shape(files[name]), FULL, make))
    keys = {
        "modules_to_save": sorted(whole - {names.name_of(family, HEAD)[0].removesuffix(".weight")} if tied else whole),
        "ensure_weight_tying": tied,
        "bias": ("lora_only" if all(biases.values()) else "all") if biases else "",
    }
    return tensors, keys
