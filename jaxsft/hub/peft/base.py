"""The base that an adapter folder is read beside: where its weights lie in our tree, and their values where needed."""

from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

from jaxsft import tree
from jaxsft.hub import names
from jaxsft.hub.files import CheckpointError
from jaxsft.hub.merge import fetch
from jaxsft.hub.names import SCORE, Address
from jaxsft.hub.peft.names import EMBED, FULL, HEAD
from jaxsft.models import TABLES, Family


class Base:
    """Where each weight of the base lies, its shape, and, where they are at hand, its values."""

    def __init__(self, params: Mapping, folder: Path, family: Family):
        self.leaves, self.folder = tree.flat(params), folder
        self.where: dict[Address, tuple[str, tuple[int, ...]]] = {}  # the leaf, and the index of it
        self.rows: dict[str, list[Address]] = {}
        for path, leaf in self.leaves.items():
            for address, (_, index) in names.by_address(family, tree.nest({path: leaf})).items():
                self.where[address] = (path, index)
                self.rows.setdefault(path, []).append(address)
        headed = any(name.path == HEAD.path for name in family.names)
        self.tied = headed and not {HEAD, SCORE} & set(self.where)
        self.size = 0  # rows of the tables, where the folder has more of them than the base
        if self.tied:
            self.where[HEAD], self.rows[HEAD.path] = (HEAD.path, ()), [HEAD]

    def leaf(self, address: Address):
        return self.leaves[EMBED.path if self.tied and address == HEAD else self.where[address][0]]

    def shape(self, address: Address) -> tuple[int, ...]:
        own = self.leaf(address).shape[len(self.where[address][1]) :]
        return (self.size, *own[1:]) if self.size and tree.matches(TABLES, address.path) else own

    def grow(self, size: int) -> None:
        """Takes note of a table in the folder; one with more rows than the base's has those of new tokens."""
        if size > max(self.shape(address)[0] for address in self.tables):
            self.size = size

    @property
    def tables(self) -> list[Address]:
        """The weights that have a row for each token."""
        return [address for address in self.where if tree.matches(TABLES, address.path)]

    def stack(self, path: str) -> tuple[int, ...]:
        """The axes of a leaf that its rows are spread over."""
        leaf = self.leaves[EMBED.path if self.tied and path == HEAD.path else path]
        return leaf.shape[: len(self.where[self.rows[path][0]][1])]

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
