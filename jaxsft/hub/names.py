"""What a weight is called here and there: (path, layer) <-> the Hugging Face name.

blocks/0-3/attn/q/kernel  [4, in, out]   <->   model.layers.{0..3}.self_attn.q_proj.weight  [out, in]
"""

from collections.abc import Mapping
from typing import NamedTuple

from jaxsft import tree
from jaxsft.models import DecoderConfig, Family, span


class Address(NamedTuple):
    """One weight of one layer; `path` leaves the stack's name out, `layer` is None for what is not stacked."""

    path: str
    layer: int | None


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
        for layer in range(config.layers) if "{layer}" in name.hf else [None]:
            found[name.hf.format(layer=layer)] = Place(Address(name.path, layer), name.transposed)
    return found


def leaf_names(family: Family, path: str) -> tuple[list[str], bool]:
    """The Hugging Face names of a leaf, a layer each, and whether those are transposed.

    Raises:
      ValueError: the family has no name for it.
    """
    plain, layers = unstacked(path)
    for name in family.names:
        if name.path == plain:
            return [name.hf.format(layer=layer) for layer in layers or [None]], name.transposed
    raise ValueError(f"no Hugging Face name for {path}; add one to FAMILY.names")


def name_of(family: Family, address: Address) -> tuple[str, bool]:
    """The Hugging Face name of one weight, and whether it is transposed there.

    Raises:
      ValueError: the family has no name for it.
    """
    for name in family.names:
        if name.path == address.path:
            return name.hf.format(layer=address.layer), name.transposed
    raise ValueError(f"no Hugging Face name for {address.path}; add one to FAMILY.names")


def by_address(params: Mapping) -> dict[Address, tuple]:
    """Lists a tree's weights by address, each as (leaf, row of the leaf or None): nothing is sliced yet."""
    found = {}
    for path, leaf in tree.flat(params).items():
        plain, layers = unstacked(path)
        for row, layer in enumerate(layers or [None]):
            found[Address(plain, layer)] = (leaf, None if layers is None else row)
    return found


def adapted(adapter: Mapping) -> dict[Address, dict[str, tuple]]:
    """Lists an adapter by the address of the weight it adds to: {part: (leaf, row or None)}, a, b, scale, ...

    Example:
      >>> list(adapted({"blocks": {"0-1": {"q": {"a": 1}}}, "embed": {"a": 2}}))[1:]
      [Address(path='blocks/q/kernel', layer=1), Address(path='embed/table', layer=None)]
    """
    found: dict[Address, dict[str, tuple]] = {}
    for (path, layer), leaf in by_address(adapter).items():
        module, _, part = path.rpartition("/")
        weight = "table" if module in ("embed", "head") else "kernel"
        found.setdefault(Address(f"{module}/{weight}", layer), {})[part] = leaf
    return found
