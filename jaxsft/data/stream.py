"""From sources to batches: read, tokenise and pack once, then shuffle, share out and resume by number (grain).

All tokens are held in flat arrays and a row is put together when it is asked for. The order is a function of the seed
and of how many batches were taken, so a position is a number, the same on every process.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from jaxsft.data import chat, formats, pack
from jaxsft.data.chat import Example
from jaxsft.data.sources import DataError, read
from jaxsft.types import Tokens

ALIGN = 64  # rows that are not packed are padded to a multiple of this
FOREVER = 2**20  # epochs; grain's own endless stream overflows when it is batched by one row


@dataclass(frozen=True)
class Config:
    """What to learn from."""

    train: str | list[str] = ""
    """files (json, jsonl, csv, parquet, txt; globs are fine) or hub data sets (org/name@subset:split)"""
    eval: str | list[str] | None = None
    """held-out data of the same kind to measure the loss on"""
    format: str = "auto"
    """alpaca, messages or text; auto tells each row by its columns"""
    max_length: int = 1024
    """tokens of a row; longer conversations are truncated, longer texts split"""
    packing: bool = True
    """several documents a row, kept apart by segments; otherwise one"""


class Report(NamedTuple):
    """What became of the data."""

    rows: int  # read
    documents: int  # conversations, and pieces of texts
    tokens: int
    trained_tokens: int
    truncated: int  # conversations that were longer than max_length
    packed_rows: int
    efficiency: float  # tokens that are no padding / all

    def lines(self) -> list[tuple[str, str]]:
        """Names and values for people.

        Example:
          >>> Report(9, 9, 4000, 1500, 0, 4, 0.9766).lines()[2:4]
          [('tokens', '4,000'), ('trained tokens', '1,500')]
        """
        show = {name: f"{value:,}" for name, value in self._asdict().items()} | {"efficiency": f"{self.efficiency:.1%}"}
        return [(name.replace("_", " "), value) for name, value in show.items()]


@dataclass(frozen=True)
class PackedRows(Sequence[Tokens]):
    """Rows of equal length, put together when asked for; documents lie in the order of the rows they are in."""

    ids: Int[np.ndarray, "N"]
    mask: Bool[np.ndarray, "N"]
    documents: Int[np.ndarray, "D+1"]  # where each begins in ids, and the end
    rows: Int[np.ndarray, "R+1"]  # which document each row begins with, and the end
    length: int

    def __len__(self) -> int:
        return len(self.rows) - 1

    def __getitem__(self, i: int) -> Tokens:  # type: ignore[override]
        i = range(len(self))[i]  # counts from the end if negative, raises IndexError if outside
        cuts = self.documents[self.rows[i] : self.rows[i + 1] + 1]
        pieces = [slice(*cut) for cut in pairwise(cuts)]
        return pack.fill([Example(self.ids[piece], self.mask[piece]) for piece in pieces], self.length)


class Batch(NamedTuple):
    """What one process gets of one batch."""

    tokens: Tokens  # numpy, [batch_size / processes, T]
    count: int  # of tokens that are no padding
    position: dict[str, Any]  # after this batch; JSON


def load(
    source: str | Sequence[str], tokenizer: Any, *, format: str = "auto", max_length: int, packing: bool
) -> tuple[PackedRows, Report]:
    """Reads, tokenises and packs.

    Args:
      source: see `sources.read`.
      tokenizer: of transformers, fast, with a chat template.
      format: a name of `FORMATS`, or "auto".
      max_length: tokens of a row.
      packing: several documents a row, or one, padded to the longest one.

    Returns:
      (rows, report).

    Raises:
      DataError: a row cannot be used; the message names its place.

    Example:
      >>> from tokenizers import Tokenizer, models, pre_tokenizers
      >>> from transformers import PreTrainedTokenizerFast
      >>> core = Tokenizer(models.WordLevel({"</s>": 0, "?": 1}, "?"))
      >>> core.pre_tokenizer = pre_tokenizers.Whitespace()
      >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")
      >>> rows, report = load("jaxsft/assets/text/notes.jsonl", tokenizer, max_length=256, packing=True)
      >>> len(rows) == report.packed_rows, rows[0].tokens.shape
      (True, (256,))
    """
    if not source:
        raise DataError("data.train is empty; give a file such as train.jsonl, or a data set of the hub")
    if max_length < 2:
        raise DataError(f"data.max_length is {max_length}; it must be at least 2, a token and the one it predicts")
    found, documents, truncated = read(source), [], 0
    for row in found:
        try:
            parsed = formats.parse(row.fields, format)
            if isinstance(parsed, chat.Text):
                documents += pack.chunks(chat.render_text(parsed, tokenizer), max_length)
            else:
                example = chat.render(parsed, tokenizer)
                truncated += len(example.ids) > max_length
                documents.append(_learnable(example, max_length))
        except DataError as error:
            raise DataError(f"{row.place}: {error}") from error
    lengths = [len(document.ids) for document in documents]
    length = max_length if packing else min(-(-max(lengths) // ALIGN) * ALIGN, max_length)
    plan = pack.plan(lengths, length) if packing else [[i] for i in range(len(documents))]
    rows = gather(documents, plan, length)
    tokens, trained = len(rows.ids), int(rows.mask.sum())
    return rows, Report(
        len(found), len(documents), tokens, trained, truncated, len(rows), tokens / (len(rows) * rows.length)
    )


def _learnable(example: Example, max_length: int) -> Example:
    if not example.mask.any():
        raise DataError("no token is learned: the answer is empty and the template has no stop token; remove the row")
    cut = pack.truncate(example, max_length)
    if not cut.mask[1:].any():
        raise DataError(f"truncation of {len(example.ids)} tokens leaves none that is learned; raise data.max_length")
    return cut


def gather(documents: Sequence[Example], plan: Sequence[Sequence[int]], length: int) -> PackedRows:
    """Lays documents into flat arrays by a plan of `pack.plan`.

    Example:
      >>> ab, cde = Example(np.array([1, 2]), np.array([0, 1])), Example(np.array([3, 4, 5]), np.array([0, 1, 1]))
      >>> gather([ab, cde], [[1], [0]], 4)[0].tokens
      array([3, 4, 5, 0], dtype=int32)
    """
    ordered = [documents[i] for row in plan for i in row]
    return PackedRows(
        np.concatenate([document.ids for document in ordered]).astype(np.int32),
        np.concatenate([document.mask for document in ordered]).astype(bool),
        np.cumsum([0, *(len(document.ids) for document in ordered)]),
        np.cumsum([0, *map(len, plan)]),
        length,
    )


def steps_per_epoch(rows: PackedRows, batch_size: int) -> int:
    """Batches that hold all rows once, the last one perhaps not full.

    Example:
      >>> steps_per_epoch(range(9), 4)
      3
    """
    return math.ceil(len(rows) / batch_size)


def batches(
    rows: PackedRows,
    batch_size: int,
    *,
    seed: int | None,
    epochs: int | None,
    position: dict[str, Any] | None = None,
    process: int = 0,
    processes: int = 1,
) -> Iterator[Batch]:
    """Batches of rows, in a new order every epoch, from any position on.

    Args:
      rows: from `load`.
      batch_size: rows of a batch, over all processes.
      seed: of the order; None keeps the rows as they lie.
      epochs: how often each row comes; None is for ever. A finite stream ends with a batch filled up with empty rows.
      position: of a batch; the next one comes first.
      process, processes: which contiguous share of each batch to give.

    Returns:
      an iterator of `Batch`; batches may hold the end of one epoch and the beginning of the next.

    Raises:
      DataError: the batch does not divide by the processes.

    Example:
      >>> documents = [Example(np.array([i, i]), np.array([0, 1])) for i in range(5)]
      >>> rows = gather(documents, [[i] for i in range(5)], 2)
      >>> stream = batches(rows, 2, seed=None, epochs=1)
      >>> first = next(stream)
      >>> first.tokens.tokens.tolist(), first.count, first.position
      ([[0, 0], [1, 1]], 4, {'next_index': 1})
      >>> [b.tokens.tokens[:, 0].tolist() for b in batches(rows, 2, seed=None, epochs=1, position=first.position)]
      [[2, 3], [4, 0]]
    """
    if batch_size < 1 or batch_size % processes:
        raise DataError(f"train.batch_size is {batch_size}; it must be a multiple of the {processes} processes")
    import grain

    data = grain.MapDataset.source(rows)
    if seed is not None:
        data = data.seed(seed).shuffle()
    data = data.repeat(FOREVER if epochs is None else epochs)  # reseeds the shuffle in each epoch
    if epochs is not None and (missing := -len(data) % batch_size):
        empty = grain.MapDataset.source([pack.fill([], rows.length)] * missing)
        data = grain.MapDataset.concatenate([data, empty])
    data = data.batch(batch_size // processes)[process::processes]
    iterator = iter(data.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)))
    if position is not None:
        iterator.set_state(position)
    return (Batch(tokens, int((tokens.segments > 0).sum()), iterator.get_state()) for tokens in iterator)
