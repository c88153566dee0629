"""Prompts, batched by length: rows of about one length share a batch.

They are not packed, since a model is still to write their end. A few lengths are chosen so
that padding costs least, which bounds what is compiled; the rows of a batch are drawn anew in every epoch. What is left
of a length fills up with rows of the next one, so that only one batch of an epoch is not full.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from jaxsft.data import pack
from jaxsft.data.load import Chosen, Config, Report, choose
from jaxsft.data.render import Example
from jaxsft.data.store import Documents
from jaxsft.data.stream import FOREVER, Batch, iterate, pick, share
from jaxsft.types import Prompts

ALIGN = 32  # lengths are multiples of this


@dataclass(frozen=True)
class PromptRows:
    """Prompts that are batched by length."""

    sources: Sequence[Documents]
    documents: Int[np.ndarray, "R"]  # numbered through all sources
    lengths: Int[np.ndarray, "R"]
    digest: str

    def __len__(self) -> int:
        return len(self.documents)

    def collate(self, chosen: Int[np.ndarray, "B"], length: int) -> Prompts:
        """Puts rows below each other, each filled up to `length`; a row of -1 is empty."""
        rows = [pack.fill([self.document(int(self.documents[i]))] if i >= 0 else [], length) for i in chosen]
        sizes = np.array([(row.segments > 0).sum() for row in rows], np.int32)
        tokens = np.stack([row.tokens for row in rows])
        return Prompts(tokens, sizes, np.asarray(chosen, np.int32))  # type: ignore[arg-type]

    def document(self, number: int) -> Example:
        """A document by its number through all sources."""
        return pick(self.sources, number)

    def fields(self, row: int) -> dict[str, Any]:
        """The other columns of a row, for a reward function."""
        number = int(self.documents[row])
        for source in self.sources:
            if number < len(source.rows):
                return source.row_fields(int(source.rows[number]))
            number -= len(source.rows)
        raise IndexError(row)


class LoadedPrompts(NamedTuple):
    """Prompts to answer, prompts to measure on, and what became of the data."""

    train: PromptRows
    eval: PromptRows | None
    report: Report


def load_prompts(config: Config, tokenizer: Any) -> LoadedPrompts:
    """Reads and tokenises prompts; a conversation's last question is one, too.

    Args:
      config: what, and how.
      tokenizer: of transformers, fast, with a chat template.

    Returns:
      (train, eval, report); the report's efficiency is that of batches by length, tokens / (tokens + padding).

    Raises:
      DataError: rows cannot be used, or are of another kind.
    """
    train, held = choose(config, tokenizer, "prompt")
    rows = _rows(train)
    ends = edges(rows.lengths)
    slots = int(ends[np.searchsorted(ends, rows.lengths)].sum())
    report = train.report._replace(packed_rows=len(rows), efficiency=train.report.tokens / max(slots, 1))
    return LoadedPrompts(rows, None if held is None else _rows(held), report)


def _rows(chosen: Chosen) -> PromptRows:
    lengths = np.concatenate([one.lengths for one in chosen.sources])[chosen.documents]
    return PromptRows(chosen.sources, chosen.documents, lengths, chosen.digest)


def edges(lengths: Int[np.ndarray, "R"], most: int = 6) -> Int[np.ndarray, "E"]:
    """Chooses at most `most` lengths, multiples of `ALIGN`, so that filling each row up to the next one costs least.

    By dynamic programming over the aligned lengths that occur.

    Example:
      >>> edges(np.array([10, 20, 30, 60, 60, 500]), most=2)
      array([ 64, 512])
    """
    aligned, count = np.unique(-(-np.asarray(lengths) // ALIGN) * ALIGN, return_counts=True)
    total = np.concatenate([[0], np.cumsum(count)])
    n, most = len(aligned), min(most, len(aligned))
    cost = np.full((most + 1, n + 1), np.inf)
    cost[:, 0] = 0
    back = np.zeros((most + 1, n + 1), int)
    for used in range(1, most + 1):
        for end in range(1, n + 1):
            tried = cost[used - 1, :end] + (total[end] - total[:end]) * aligned[end - 1]
            back[used, end] = int(np.argmin(tried))
            cost[used, end] = tried[back[used, end]]
    found, end = [], n
    for used in range(most, 0, -1):
        if end:
            found.append(aligned[end - 1])
            end = back[used, end]
    return np.array(found[::-1])


class _Epochs:
    """All batches of many epochs by number, as grain reads them."""

    def __init__(self, rows: PromptRows, batch_size: int, seed: int | None, epochs: int, part: slice):
        self.rows, self.batch_size, self.seed, self.part = rows, batch_size, seed, part
        self.ends = edges(rows.lengths)
        self.per_epoch = -(-len(rows) // batch_size)
        self.count = self.per_epoch * epochs
        self.plan = functools.lru_cache(maxsize=2)(self._plan)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        epoch, here = divmod(int(index), self.per_epoch)
        chosen, length = self.plan(epoch)[here]
        return self.rows.collate(chosen[self.part], int(length))

    def _plan(self, epoch: int) -> list[tuple[Int[np.ndarray, "B"], int]]:
        draw = np.random.default_rng([self.seed or 0, epoch])
        order = np.arange(len(self.rows)) if self.seed is None else draw.permutation(len(self.rows))
        bucket = np.searchsorted(self.ends, self.rows.lengths[order])
        found, left = [], np.zeros(0, np.int64)
        for number, length in enumerate(self.ends):
            here = np.concatenate([left, order[bucket == number]])
            whole = len(here) // self.batch_size * self.batch_size
            found += [(part, length) for part in here[:whole].reshape(-1, self.batch_size)]
            left = here[whole:]
        if len(left):
            found.append((np.pad(left, (0, self.batch_size - len(left)), constant_values=-1), self.ends[-1]))
        return found if self.seed is None else [found[i] for i in draw.permutation(len(found))]


def batches_by_length(
    rows: PromptRows,
    batch_size: int,
    *,
    seed: int | None,
    epochs: int | None,
    position: dict[str, Any] | None = None,
    process: int = 0,
    processes: int = 1,
) -> Iterator[Batch]:
    """Batches of rows of about one length, in a new order every epoch, from any position on.

    Args:
      rows: from `load_prompts`.
      batch_size: rows of a batch, over all processes.
      seed: of the order; None goes from short to long.
      epochs: how often each row comes; None is for ever. Each epoch's last batch may be filled up with empty rows.
      position: of a batch; the next one comes first.
      process, processes: which contiguous share of each batch to give.

    Returns:
      an iterator of `Batch` of `Prompts`.

    Raises:
      DataError: the batch does not divide by the processes, or the position is one in other data.
    """
    size = share(batch_size, processes)
    import grain

    part = slice(process * size, (process + 1) * size)
    data = grain.MapDataset.source(_Epochs(rows, batch_size, seed, FOREVER if epochs is None else epochs, part))
    return iterate(data, rows.digest, position, lambda prompts: int(prompts.lengths.sum()))
