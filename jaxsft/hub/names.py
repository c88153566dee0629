"""What a weight is called here and there: (path, layer, expert) <-> the Hugging Face name.

blocks/0-3/attn/q/kernel             [4, in, out]      model.layers.{0..3}.self_attn.q_proj.weight        [out, in]
blocks/0-3/moe/experts/up/kernel     [4, 8, in, out]   model.layers.{0..3}.mlp.experts.{0..7}.up_proj.weight
"""

import itertools
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from jaxsft import tree
from jaxsft.models import DecoderConfig, Family, Name, span


class Address(NamedTuple):
    """One weight; `path` leaves the stack's name out, layer and expert are None where there is no such axis."""

    path: str
    layer: int | None
    expert: int | None = None


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
    return (path, None) if first != "blocks" else ("/".join([first, *rest[1:]]), span(rest[0]))


def places(family: Family, config: DecoderConfig) -> dict[str, Place]:
    """Every Hugging Face name that this family may have, and the weight it stands for."""
    found = {}
    for name in family.names:
        layers = range(config.layers) if "{layer}" in name.hf else [None]
        experts = range(config.moe.experts) if "{expert}" in name.hf and config.moe else [None]
        if "{expert}" in name.hf and config.moe is None:
            continue
        for layer, expert in itertools.product(layers, experts):
            found[name.hf.format(layer=layer, expert=expert)] = Place(
                Address(name.path, layer, expert), name.transposed
            )
    return found


def name_of(family: Family, path: str) -> Name:
    """The entry of the family's table for a leaf.

    Raises:
      ValueError: the family has no name for it.
    """
    plain = unstacked(path)[0]
    for name in family.names:
        if name.path == plain:
            return name
    raise ValueError(f"no Hugging Face name for {path}; add one to FAMILY.names")


def leaf_names(family: Family, path: str, shape: tuple[int, ...]) -> tuple[np.ndarray, bool]:
    """The Hugging Face names of a leaf, and whether those tensors are transposed.

    Returns:
      (names, transposed): an array of strings whose axes are the leaf's first ones, those that files keep apart: none,
      [layers] or [layers, experts].

    Raises:
      ValueError: the family has no name for it.
    """
    name, layers = name_of(family, path), unstacked(path)[1]
    experts = shape[1] if "{expert}" in name.hf else 1
    grid = [[name.hf.format(layer=layer, expert=e) for e in range(experts)] for layer in layers or [None]]
    axes = (len(layers) if layers else 1, experts)[: name.axes]
    return np.array(grid, object).reshape(axes), name.transposed


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
