"""An embedder without a model, and folders of documents, for tests of what stands on embedders."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxsft.rag import index, store

DIM = 32


class Hashing(NamedTuple):
    """Each word is a fixed random direction; a text is the sum of its words."""

    name: str = "hashing"
    digest: str = "hashing-1"
    dim: int = DIM
    max_tokens: int = 64

    def documents(self, texts: Sequence[str]) -> np.ndarray:
        found = np.stack([np.zeros(DIM), *(sum(map(word, text.split()), np.zeros(DIM)) for text in texts)])[1:]
        return (found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-9)).astype(np.float32)

    def queries(self, texts: Sequence[str]) -> np.ndarray:
        return self.documents(texts)

    def unknown(self, text: str) -> float:
        return float(np.mean([not one.isascii() for one in text.split()])) if text.split() else 0.0

    def length(self, text: str) -> int:
        return len(text.split())


def word(text: str) -> np.ndarray:
    seed = int.from_bytes(hashlib.blake2b(text.strip(".,?!").lower().encode(), digest_size=8).digest())
    return np.random.default_rng(seed).standard_normal(DIM)


def about(**other) -> store.About:
    return store.About(**{"embedder": "hashing", "digest": "hashing-1", "dim": DIM, "size": 12, "overlap": 0, **other})


def write(folder: Path, texts: dict[str, str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    return folder


def build(folder: Path, texts: dict[str, str], **other) -> store.Store:
    """A store beside a folder with these files, which is indexed."""
    made = store.create(str(folder / "store"), about(**other))
    index.update(made, write(folder / "docs", texts), Hashing())
    return made


def contents(made: store.Store) -> list[tuple]:
    """All that a store says, in order; two stores of the same documents say the same."""
    rows = made.passages.search().limit(None).to_arrow().drop_columns(["vector"]).to_pylist()
    assert len({row["id"] for row in rows}) == len(rows)
    return sorted((row["source"], row["number"], row["text"], row["file"], row["digest"], *row["tags"]) for row in rows)
