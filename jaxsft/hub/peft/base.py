"""The base that an adapter folder is read beside: where its weights lie in our tree, and their values where needed."""

from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

from jaxsft import tree
from jaxsft.hub import names
from jaxsft.hub.files import CheckpointError
from jaxsft.hub.names import Address
from jaxsft.hub.peft.names import EMBED, FULL, HEAD
from jaxsft.hub.weights import fetch


class Base:
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
