"""From packed rows to batches: shuffle, share out and resume by number (grain).

Tokens stay on disk and a row is put together when it is asked for. The order is a function of the seed and of how many
batches were taken, so a position is a number, the same on every process; the digest beside it tells which data it is
a position in.
"""

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Int

from jaxsft.data import pack
from jaxsft.data.render import Example
from jaxsft.data.rows import DataError
from jaxsft.data.store import Documents, hold
from jaxsft.types import Contrasts, Tokens

if TYPE_CHECKING:
    from jaxsft.data.contrasts import ContrastRows
    from jaxsft.data.pairs import PackedPairs

FOREVER = 2**20  # epochs; grain's own endless stream overflows when it is batched by one row


@dataclass(frozen=True)
class PackedRows(Sequence[Tokens]):
    """Rows of equal length, put together when asked for.

    documents: row by row, numbered through all sources; rows: where in it each row begins, and the end.
    """

    sources: Sequence[Documents]
    documents: Int[np.ndarray, "D"]
    rows: Int[np.ndarray, "R+1"]
    length: int
    digest: str  # of what the rows are

    def __len__(self) -> int:
        return len(self.rows) - 1

    def __getitem__(self, i: int) -> Tokens:  # type: ignore[override]
        i = range(len(self))[i]  # counts from the end if negative, raises IndexError if outside
        return pack.fill([self.document(d) for d in self.documents[self.rows[i] : self.rows[i + 1]]], self.length)

    def empty(self) -> Tokens:
        """A row of padding, which fills up a batch."""
        return pack.fill([], self.length)

    def document(self, number: int) -> Example:
        """A document by its number through all sources."""
        return pick(self.sources, number)


def pick(found: Sequence[Documents], number: int) -> Example:
    """A document by its number through all sources."""
    ends = np.cumsum([len(one.learned) for one in found])
    which = bisect_right(ends, number)
    return found[which].example(int(number - (ends[which - 1] if which else 0)))


class Batch(NamedTuple):
    """What one process gets of one batch."""

    tokens: Any  # Tokens, Pairs or Prompts of numpy arrays, [batch_size / processes, ...]
    count: int  # of tokens that are no padding
    position: dict[str, Any]  # after this batch; JSON


def steps_per_epoch(rows: "PackedRows | PackedPairs | ContrastRows", batch_size: int) -> int:
    """Batches that hold all rows once, the last one perhaps not full.

    Example:
      >>> steps_per_epoch(range(9), 4)
      3
    """
    return math.ceil(len(rows) / batch_size)


def batches(
    rows: "PackedRows | PackedPairs | ContrastRows",
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
      rows: from `load` or `load_pairs`.
      batch_size: rows of a batch, over all processes.
      seed: of the order; None keeps the rows as they lie.
      epochs: how often each row comes; None is for ever. A finite stream ends with a batch filled up with empty rows.
      position: of a batch; the next one comes first.
      process, processes: which contiguous share of each batch to give.

    Returns:
      an iterator of `Batch`; batches may hold the end of one epoch and the beginning of the next.

    Raises:
      DataError: the batch does not divide by the processes, or the position is one in other data.

    Example:
      >>> rows = in_memory([Example(np.array([i, i]), np.array([0, 1])) for i in range(5)], 2)
      >>> first = next(batches(rows, 2, seed=None, epochs=1))
      >>> first.tokens.tokens.tolist(), first.count, first.position
      ([[0, 0], [1, 1]], 4, {'next_index': 1, 'data': 'memory'})
      >>> [b.tokens.tokens[:, 0].tolist() for b in batches(rows, 2, seed=None, epochs=1, position=first.position)]
      [[2, 3], [4, 0]]
    """
    given = {"seed": seed, "epochs": epochs, "process": process, "processes": processes}
    data = ordered(rows, rows.empty(), batch_size, **given)
    return iterate(data, rows.digest, position, _count)


def ordered(
    source: Sequence, empty: Any, batch_size: int, *, seed: int | None, epochs: int | None, process: int, processes: int
) -> Any:
    """The batches of a source as a grain data set; `empty` fills up the last one, the rest is as for `batches`."""
    share(batch_size, processes)
    import grain

    data = grain.MapDataset.source(source)
    if seed is not None:
        data = data.seed(seed).shuffle()
    data = data.repeat(FOREVER if epochs is None else epochs)  # reseeds the shuffle in each epoch
    if epochs is not None and (missing := -len(data) % batch_size):
        data = grain.MapDataset.concatenate([data, grain.MapDataset.source([empty] * missing)])
    return data.batch(batch_size // processes)[process::processes]


def _count(tokens: Any) -> int:
    """How many tokens are no padding."""
    if isinstance(tokens, Contrasts):
        return int(tokens.query_sizes.sum() + tokens.passage_sizes.sum())
    return int((tokens.segments > 0).sum())


def share(batch_size: int, processes: int) -> int:
    """Rows that one process has of a batch."""
    if batch_size < 1 or batch_size % processes:
        raise DataError(f"train.batch_size is {batch_size}; it must be a multiple of the {processes} processes")
    return batch_size // processes


def iterate(data: Any, digest: str, position: dict[str, Any] | None, count: Any) -> Iterator[Batch]:
    """Batches of a grain data set, each with its position, from a position on."""
    import grain

    iterator = iter(data.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)))
    if position is not None:
        if position.get("data") != digest:
            raise DataError(
                "the data is not that of the checkpoint: a file, the tokenizer, its template or a data setting has "
                "changed since; restore it to continue, or start anew in another run.output_dir"
            )
        iterator.set_state({name: value for name, value in position.items() if name != "data"})
    return (Batch(tokens, count(tokens), iterator.get_state() | {"data": digest}) for tokens in iterator)


def in_memory(documents: Sequence[Example], length: int, plan: Sequence[Sequence[int]] | None = None) -> PackedRows:
    """Packed rows of documents that are at hand: for tests, and for research code with its own data.

    Args:
      documents: none longer than `length`.
      length: tokens of a row.
      plan: which documents lie in which row; one a row by default.

    Example:
      >>> ab, cde = Example(np.array([1, 2]), np.array([0, 1])), Example(np.array([3, 4, 5]), np.array([0, 1, 1]))
      >>> in_memory([ab, cde], 4, [[1], [0]])[0].tokens
      array([3, 4, 5, 0], dtype=int32)
    """
    plan = [[i] for i in range(len(documents))] if plan is None else plan
    order = np.array([i for row in plan for i in row], np.int32)
    return PackedRows([hold(documents)], order, np.cumsum([0, *map(len, plan)]), length, "memory")
