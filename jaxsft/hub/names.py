"""What a weight is called here and there: (path, layer, expert) <-> the Hugging Face name.

blocks/0-3/attn/q/kernel             [4, in, out]      model.layers.{0..3}.self_attn.q_proj.weight        [out, in]
blocks/0-3/moe/experts/up/kernel     [4, 8, in, out]   model.layers.{0..3}.mlp.experts.{0..7}.up_proj.weight
stage1/0-2/conv/filters              [3, out, in, ...] convnext.encoder.stages.1.layers.{0..2}.dwconv.weight

A family has one name for each; a file may have it without the prefix of the base model, or in an older form. So every
function here takes the names of a file, and speaks as the file does; without any, as the family does.
"""

import itertools
import re
from collections.abc import Collection, Mapping
from typing import NamedTuple

import numpy as np

from jaxsft import tree
from jaxsft.models import HEADS, Family, ModelConfig, Name, layers_of, span

# Buffers that older checkpoints carry and that follow from the config.
DERIVED = ("rotary_emb.inv_freq", "masked_bias", "attn.bias", "embeddings.position_ids")
STACK = re.compile(r"\d+-\d+")  # the name of a stack of layers
OLDER = (("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta"))  # the first BERTs


class Address(NamedTuple):
    """One weight; `path` leaves the stack's name out, layer and expert are None where there is no such axis."""

    path: str
    layer: int | None
    expert: int | None = None


SCORE = Address("score/kernel", None)


class Place(NamedTuple):
    address: Address
    transposed: bool


def unstacked(path: str) -> tuple[str, range | None]:
    """Splits a leaf's path into the path without its stack, and the layers of that stack.

    Example:
      >>> unstacked("blocks/0-3/attn/q/kernel")
      ('blocks/attn/q/kernel', range(0, 4))
      >>> unstacked("norm/scale")
      ('norm/scale', None)
    """
    first, *rest = path.split("/")
    return ("/".join([first, *rest[1:]]), span(rest[0])) if rest and STACK.fullmatch(rest[0]) else (path, None)


def stored(family: Family, name: str, files: Collection[str]) -> str:
    """What a file calls the tensor that the family calls `name`; that name where the file has no other for it.

    Example:
      >>> from jaxsft.models import FAMILIES
      >>> name = "bert.embeddings.LayerNorm.weight"
      >>> stored(FAMILIES["bert"], name, ["embeddings.LayerNorm.gamma", "pooler.dense.weight"])
      'embeddings.LayerNorm.gamma'
    """
    forms = [name, name.removeprefix(family.prefix)]
    forms += [form.replace(*pair) for pair in OLDER for form in forms]
    forms += [module(family, form) for form in forms if family.modules]
    return next((form for form in forms if form in files), name)


def module(family: Family, name: str) -> str:
    """What transformers' modules, and with them PEFT's files, call the tensor that a file calls `name`.

    Example:
      >>> from jaxsft.models import VISION
      >>> module(VISION["vit"], "vit.encoder.layer.3.attention.attention.query.weight")
      'vit.layers.3.attention.q_proj.weight'
    """
    for pattern, replacement in family.modules:
        name = re.sub(pattern, replacement, name)
    return name


def places(family: Family, config: ModelConfig, files: Collection[str] = ()) -> dict[str, Place]:
    """Every Hugging Face name that this family may have, and the weight it stands for; tied copies are among them."""
    found, moe = {}, getattr(config, "moe", None)
    for name in family.names:
        experts = range(moe.experts) if moe and "{expert}" in name.hf else [None]
        layers = range(layers_of(config, name.path)) if "{layer}" in name.hf else [None]
        for layer, expert in itertools.product(layers, experts):
            here = stored(family, name.hf.format(layer=layer, expert=expert), files)
            found[here] = Place(Address(name.path, layer, expert), name.transposed)
    if config.tied:
        second = {copy: found[stored(family, first, files)] for copy, first in family.copies if copy in files}
        found = found | second
    return found


def entry(family: Family, path: str) -> Name:
    """The entry of the family's table for a path without its stack.

    Raises:
      ValueError: the family has no name for it.
    """
    for name in family.names:
        if name.path == path:
            return name
    raise ValueError(f"no Hugging Face name for {path}; add one to FAMILY.names")


def leaf_names(
    family: Family, path: str, shape: tuple[int, ...], files: Collection[str] = ()
) -> tuple[np.ndarray, bool]:
    """The Hugging Face names of a leaf, and whether those tensors are transposed.

    Returns:
      (names, transposed): an array of strings whose axes are the leaf's first ones, those that files keep apart: none,
      [layers] or [layers, experts].

    Raises:
      ValueError: the family has no name for it.
    """
    plain, layers = unstacked(path)
    name = entry(family, plain)
    experts = range(shape[1]) if "{expert}" in name.hf else [None]
    grid = itertools.product(layers or [None], experts)
    here = [stored(family, name.hf.format(layer=layer, expert=expert), files) for layer, expert in grid]
    return np.array(here, object).reshape(shape[: name.axes]), name.transposed


def name_of(family: Family, address: Address) -> tuple[str, bool]:
    """The Hugging Face name of one weight, and whether it is transposed there.

    Raises:
      ValueError: the family has no name for it.
    """
    name = entry(family, address.path)
    return name.hf.format(layer=address.layer, expert=address.expert), name.transposed


def heads(family: Family, files: Collection[str]) -> set[str]:
    """The tensors of a file that make scores of texts or images."""
    found = {stored(family, name.hf, files) for name in family.names if tree.matches(HEADS, name.path)}
    return found & set(files)


def unused(family: Family, name: str) -> bool:
    """Whether a tensor takes no part in what we compute: a head that nobody asks, or a buffer."""
    return name.endswith(DERIVED) or tree.matches(family.unused, name)


def by_address(family: Family, params: Mapping) -> dict[Address, tuple]:
    """Lists a tree's weights, or its adapter's leaves, by address, each as (leaf, index): nothing is sliced yet."""
    apart = {name.path.rpartition("/")[0] for name in family.names if "{expert}" in name.hf}
    found = {}
    for path, leaf in tree.flat(params).items():
        plain, layers = unstacked(path)
        experts = range(leaf.shape[1]) if plain.rpartition("/")[0] in apart else None
        for row, layer in enumerate(layers or [None]):
            for expert in experts or [None]:
                index = () if layers is None else (row,) if expert is None else (row, expert)
                found[Address(plain, layer, expert)] = (leaf, index)
    return found


def adapted(family: Family, adapter: Mapping) -> dict[Address, dict[str, tuple]]:
    """Lists an adapter by the address of the weight it adds to: {part: (leaf, index)}, a, b, scale, ...

    Example:
      >>> from jaxsft.models import FAMILIES
      >>> list(adapted(FAMILIES["llama"], {"blocks": {"0-1": {"q": {"a": 1}}}, "embed": {"a": 2}}))[1:]
      [Address(path='blocks/q/kernel', layer=1, expert=None), Address(path='embed/table', layer=None, expert=None)]
    """
    found: dict[Address, dict[str, tuple]] = {}
    for address, leaf in by_address(family, adapter).items():
        module, _, part = address.path.rpartition("/")
        weight = "table" if module in ("embed", "head") else "kernel"
        found.setdefault(address._replace(path=f"{module}/{weight}"), {})[part] = leaf
    return found
