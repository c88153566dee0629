"""Tokenised documents on disk: flat arrays in a folder, mapped into memory when they are asked for.

    ids, mask        all documents one after the other
    starts           [D + 1] where each document begins
    learned          [D] how many of its tokens are learned
    rows             [D] the row it comes from; texts become several documents, preferences two
    hashes           [R] of each row's documents, before they were cut
    values           [R] a number that the row brings: a label, a margin
    fields, ends     [R] JSON that the row brings, and where it ends

A folder appears under its name when all of it is written, so it is whole or not there.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, UInt64

from jaxsft.data.render import Example
from jaxsft.data.rows import DataError

KINDS = {
    "ids": np.int32,
    "mask": np.bool_,
    "starts": np.int64,
    "learned": np.int32,
    "rows": np.int32,
    "hashes": np.uint64,
    "values": np.float32,
    "fields": np.uint8,
    "ends": np.int64,
}


class Documents(NamedTuple):
    """The arrays of a folder, on disk; see the module."""

    ids: Int[np.ndarray, "N"]
    mask: Bool[np.ndarray, "N"]
    starts: Int[np.ndarray, "D+1"]
    learned: Int[np.ndarray, "D"]
    rows: Int[np.ndarray, "D"]
    hashes: UInt64[np.ndarray, "R"]
    values: Float[np.ndarray, "R"]
    fields: Int[np.ndarray, "M"]
    ends: Int[np.ndarray, "R"]
    meta: Mapping[str, Any]  # what became of the source

    @property
    def lengths(self) -> Int[np.ndarray, "D"]:
        return np.diff(self.starts)

    def example(self, document: int) -> Example:
        here = slice(self.starts[document], self.starts[document + 1])
        return Example(self.ids[here], self.mask[here])

    def row_fields(self, row: int) -> dict[str, Any]:
        """The JSON that a row brought, {} for none."""
        text = bytes(self.fields[self.ends[row - 1] if row else 0 : self.ends[row]])
        return json.loads(text) if text else {}


class Piece(NamedTuple):
    """Some rows, tokenised; the arrays of `Documents`, with rows and starts counted from 0."""

    examples: Sequence[Example]
    rows: Sequence[int]
    hashes: Sequence[int]
    values: Sequence[float]
    fields: Sequence[bytes]


class Writer:
    """Writes documents into a new folder as they come; memory does not grow with them."""

    def __init__(self, folder: Path):
        self.folder = folder
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            self._part = Path(tempfile.mkdtemp(prefix=folder.name + ".part-", dir=folder.parent))
        except OSError as error:
            raise DataError(f"data.cache {folder.parent} cannot be written ({error}); name another folder") from error
        self._files = {name: (self._part / f"{name}.bin").open("wb") for name in KINDS}
        self.rows = self.documents = self.tokens = self.largest = self._bytes = 0
        self._put("starts", [0])

    def _put(self, name: str, values: Any) -> None:
        try:
            self._files[name].write(np.asarray(values, KINDS[name]).tobytes())
        except OSError as error:
            self.drop()
            raise DataError(f"data.cache {self.folder.parent} cannot be written ({error}); free some space") from error

    def add(self, piece: Piece) -> None:
        lengths = [len(example.ids) for example in piece.examples]
        for example in piece.examples:
            self._put("ids", example.ids)
            self.largest = max(self.largest, int(np.max(example.ids, initial=0)))
            self._put("mask", example.mask)
        self._put("starts", self.tokens + np.cumsum(lengths))
        self._put("learned", [int(example.mask.sum()) for example in piece.examples])
        self._put("rows", self.rows + np.asarray(piece.rows, np.int64))
        self._put("hashes", piece.hashes)
        self._put("values", piece.values)
        self._put("fields", np.frombuffer(b"".join(piece.fields), np.uint8))
        self._put("ends", self._bytes + np.cumsum([len(field) for field in piece.fields]))
        self._bytes += sum(map(len, piece.fields))
        self.tokens += sum(lengths)
        self.documents += len(lengths)
        self.rows += len(piece.hashes)

    def finish(self, meta: Mapping[str, Any]) -> Documents:
        """Gives the folder its name; another process may have been faster, with the same content."""
        for file in self._files.values():
            file.close()
        (self._part / "meta.json").write_text(json.dumps(meta, ensure_ascii=False, indent=1), encoding="utf-8")
        try:
            os.rename(self._part, self.folder)
        except OSError:
            self.drop()
        return open_documents(self.folder)

    def drop(self) -> None:
        for file in self._files.values():
            file.close()
        shutil.rmtree(self._part, ignore_errors=True)


def hold(examples: Sequence[Example]) -> Documents:
    """Documents that are in memory, a row each.

    Example:
      >>> hold([Example(np.array([1, 2]), np.array([0, 1])), Example(np.array([3]), np.array([0]))]).lengths
      array([2, 1])
    """
    numbers = np.arange(len(examples))
    ids = np.concatenate([ids for ids, _ in examples]).astype(np.int32)
    return Documents(
        ids=ids,
        mask=np.concatenate([mask for _, mask in examples]).astype(bool),
        starts=np.cumsum([0, *(len(ids) for ids, _ in examples)]),
        learned=np.array([int(np.sum(mask)) for _, mask in examples], np.int32),
        rows=numbers.astype(np.int32),
        hashes=numbers.astype(np.uint64),
        values=np.zeros(len(examples), np.float32),
        fields=np.zeros(0, np.uint8),
        ends=np.zeros(len(examples), np.int64),
        meta={"source": "memory", "largest": int(ids.max(initial=0))},
    )


def expect_tokens(found: Sequence[Documents], size: int) -> None:
    """Refuses documents with a token that a model of `size` tokens does not have.

    Raises:
      DataError: names the source and the token.
    """
    for one in found:
        if (largest := one.meta["largest"]) >= size:
            raise DataError(
                f"{one.meta['source']} becomes tokens as large as {largest}, and the model has {size}, from 0 on. Does "
                "the tokenizer belong to the model? Then name the token in model.new_tokens, which gives it a row"
            )


def open_documents(folder: Path) -> Documents:
    """Maps what a `Writer` has written.

    Raises:
      DataError: it is not whole.
    """
    arrays = {}
    try:
        for name, kind in KINDS.items():
            file = folder / f"{name}.bin"
            arrays[name] = np.memmap(file, kind, "r") if file.stat().st_size else np.zeros(0, kind)
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{folder} is not whole ({error}); delete it, and the data is tokenised again") from error
    return Documents(**arrays, meta=meta)
