"""What a weight is called here and there: (path, layer) <-> the Hugging Face name.

blocks/0-3/attn/q/kernel  [4, in, out]   <->   model.layers.{0..3}.self_attn.q_proj.weight  [out, in]

A family has one name for each; a file may have it without the prefix of the base model, or in an older form. So every
function here takes the names of a file, and speaks as the file does; without any, as the family does.
"""

from collections.abc import Collection, Mapping
from typing import NamedTuple

from jaxsft import tree
from jaxsft.models import Family, ModelConfig, span

# Buffers that older checkpoints carry and that follow from the config.
DERIVED = ("rotary_emb.inv_freq", "masked_bias", "attn.bias", "embeddings.position_ids")
OLDER = (("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta"))  # the first BERTs


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
    return next((form for form in forms if form in files), name)


def places(family: Family, config: ModelConfig, files: Collection[str] = ()) -> dict[str, Place]:
    """Every Hugging Face name that this family may have, and the weight it stands for; tied copies are among them."""
    found = {}
    for name in family.names:
        for layer in range(config.layers) if "{layer}" in name.hf else [None]:
            here = stored(family, name.hf.format(layer=layer), files)
            found[here] = Place(Address(name.path, layer), name.transposed)
    if config.tied:
        second = {copy: found[stored(family, first, files)] for copy, first in family.copies if copy in files}
        found = found | second
    return found


def leaf_names(family: Family, path: str, files: Collection[str] = ()) -> tuple[list[str], bool]:
    """The Hugging Face names of a leaf, a layer each, and whether those are transposed.

    Raises:
      ValueError: the family has no name for it.
    """
    plain, layers = unstacked(path)
    for name in family.names:
        if name.path == plain:
            here = [stored(family, name.hf.format(layer=layer), files) for layer in layers or [None]]
            return here, name.transposed
    raise ValueError(f"no Hugging Face name for {path}; add one to FAMILY.names")


def unused(family: Family, name: str) -> bool:
    """Whether a tensor takes no part in what we compute: a head that nobody asks, or a buffer."""
    return name.endswith(DERIVED) or tree.matches(family.unused, name)


def by_address(params: Mapping) -> dict[Address, tuple]:
    """Lists a tree's weights by address, each as (leaf, row of the leaf or None): nothing is sliced yet."""
    found = {}
    for path, leaf in tree.flat(params).items():
        plain, layers = unstacked(path)
        for row, layer in enumerate(layers or [None]):
            found[Address(plain, layer)] = (leaf, None if layers is None else row)
    return found
