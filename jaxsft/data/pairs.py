"""Two answers to each prompt, packed into rows in which the prompt stands once; `types.Pairs` shows one.

Of an unpaired answer the other side is the next answer to another prompt, put behind this row's: with such a mismatched
pair KTO measures how far a policy has moved (Ethayarajh et al. 2024, arXiv:2402.01306, section 4.1). The next one is
that of the data, and the first ones follow the last, so what is measured does not depend on the batches; TRL rotates
the answers within the batch of each device, whatever their prompts.
"""

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from jaxsft.data import pack
from jaxsft.data.load import ALIGN, Chosen, Config, Report, choose, digest_of
from jaxsft.data.render import Example
from jaxsft.data.rows import DataError
from jaxsft.data.store import Documents, hold
from jaxsft.data.stream import pick
from jaxsft.types import Pairs


@dataclass(frozen=True)
class PackedPairs(Sequence[Pairs]):
    """Rows of equal length, put together when asked for. R pairs lie in them, each as often as it comes in an epoch."""

    sources: Sequence[Documents]
    documents: Int[np.ndarray, "R 2"]  # of chosen and rejected, numbered through all sources
    values: Float[np.ndarray, "R"]  # margins or labels
    shared: Int[np.ndarray, "R"]  # tokens of the prompt that stand in the row once
    order: Int[np.ndarray, "N"]  # the pairs, row by row
    rows: Int[np.ndarray, "M+1"]  # where in `order` each row begins, and the end
    length: int
    digest: str  # of what the rows are
    mismatched: int = 0  # rejected is the answer of another prompt, cut to this length of the whole; 0: it is not
    reference: Float[np.ndarray, "R 2"] | None = None

    def __len__(self) -> int:
        return len(self.rows) - 1

    def __getitem__(self, i: int) -> Pairs:  # type: ignore[override]
        i = range(len(self))[i]  # counts from the end if negative, raises IndexError if outside
        return self._row(self.order[self.rows[i] : self.rows[i + 1]])

    @functools.cached_property
    def most(self) -> int:
        """Pairs of the fullest row, for which every row has place."""
        return int(np.diff(self.rows).max())

    @functools.cached_property
    def longer(self) -> Int[np.ndarray, "R"]:
        """Tokens of the chosen answer less those of the rejected one."""
        ends = np.concatenate([one.lengths for one in self.sources])
        return ends[self.documents[:, 0]] - ends[self.documents[:, 1]]

    def empty(self) -> Pairs:
        """A row of padding, which fills up a batch."""
        return self._row(self.order[:0])

    def document(self, number: int) -> Example:
        """A document by its number through all sources."""
        return pick(self.sources, number)

    def pair(self, number: int) -> tuple[Example, Example]:
        """The documents of chosen and rejected, each as it would stand alone; `number` is `Pairs.row`."""
        return _pair(self.sources, self.documents[number], self.mismatched)

    def with_reference(self, values: Float[np.ndarray, "R 2"], name: str) -> "PackedPairs":
        """The same rows with the log-probabilities that a reference gave, and a digest that tells which those are.

        Args:
          values: of chosen and rejected, by the number of the pair.
          name: of what decides them; their last bits do not, which another machine may compute otherwise.

        Raises:
          ValueError: there are more or fewer, or one is not finite.
        """
        values = np.asarray(values, np.float32)
        if values.shape != self.documents.shape:
            raise ValueError(f"the reference has shape {values.shape}; expected {self.documents.shape}, a line a pair")
        if wrong := np.flatnonzero(~np.isfinite(values).all(axis=1)).tolist():
            raise ValueError(f"the reference of pair {wrong[0]} is {values[wrong[0]].tolist()}; expected numbers")
        return dataclasses.replace(self, reference=values, digest=digest_of(self.digest, name))

    def _row(self, numbers: Int[np.ndarray, "_"]) -> Pairs:
        count = len(numbers)
        value, row = np.zeros(self.most, np.float32), np.full(self.most, -1, np.int32)
        reference = np.zeros((self.most, 2), np.float32)
        value[:count], row[:count] = self.values[numbers], numbers
        if self.reference is not None:
            reference[:count] = self.reference[numbers]
        parts, firsts = [], []
        for number in numbers:
            (chosen, rejected), shared = self.pair(number), int(self.shared[number])
            parts += [_part(chosen, 0, shared), _part(chosen, shared), _part(rejected, shared)]
            firsts += [0, shared, shared]
        packed = pack.fill(parts, self.length, firsts)
        return Pairs(*packed, value=value, exists=row >= 0, row=row, reference=reference)  # type: ignore[arg-type]


def _part(example: Example, start: int, stop: int | None = None) -> Example:
    return Example(example.ids[start:stop], example.mask[start:stop])


def _pair(sources: Sequence[Documents], documents: Int[np.ndarray, "2"], mismatched: int) -> tuple[Example, Example]:
    chosen, rejected = (pick(sources, int(number)) for number in documents)
    return chosen, mismatch(chosen, rejected, mismatched) if mismatched else rejected


def mismatch(asked: Example, answered: Example, max_length: int) -> Example:
    """The prompt of one document with the answer of another, which loses its end where both are too long.

    Example:
      >>> one, other = Example(np.arange(4), np.arange(4) > 1), Example(np.arange(5, 10), np.arange(5) > 0)
      >>> mismatch(one, other, 5).ids.tolist()
      [0, 1, 6, 7, 8]
    """
    prompt, answer = int(np.argmax(asked.mask)), int(np.argmax(answered.mask))
    join = lambda start, end: np.concatenate([start[:prompt], end[answer:]])[:max_length]
    return Example(join(asked.ids, answered.ids), join(asked.mask, answered.mask))


def _prompt(example: Example) -> bytes:
    return example.ids[: int(np.argmax(example.mask))].tobytes()


def elsewhere(prompts: Sequence[Any]) -> Int[np.ndarray, "R"] | None:
    """For each row the next one with another prompt, going round; None where all have the same.

    Example:
      >>> elsewhere("aabc")
      array([2, 2, 3, 0])
    """
    count = len(prompts)
    after = lambda i: (i + 1) % count
    ends = next((i for i in range(count) if prompts[i] != prompts[after(i)]), None)
    if ends is None:
        return None
    found = np.zeros(count, np.int64)
    for i in range(ends, ends - count, -1):
        here = i % count
        found[here] = after(here) if prompts[here] != prompts[after(here)] else found[after(here)]
    return found


def prompt_length(chosen: Example, rejected: Example) -> int:
    """Tokens of the prompt of two documents: those that both begin with, up to the first one that either learns.

    Example:
      >>> prompt_length(Example(np.array([5, 6, 7]), np.arange(3) > 1), Example(np.array([5, 6, 8]), np.arange(3) > 1))
      2
    """
    size = min(len(chosen.ids), len(rejected.ids))
    ends = (chosen.ids[:size] != rejected.ids[:size]) | chosen.mask[:size] | rejected.mask[:size]
    return int(np.argmax(ends)) if ends.any() else size


class LoadedPairs(NamedTuple):
    """Pairs to learn, pairs to measure on, and what became of the data."""

    train: PackedPairs
    eval: PackedPairs | None
    report: Report


def load_pairs(
    config: Config, tokenizer: Any, kind: Literal["preference", "unpaired"], *, share_prompt: bool = True
) -> LoadedPairs:
    """Reads, tokenises and packs preferences, or answers with a label.

    Args:
      config: what, and how. A row has twice data.max_length, as that is the most tokens of one document, prompt and
        answer; without data.packing it is one pair, and as long as the longest of them.
      tokenizer: of transformers, fast, with a chat template.
      kind: "preference", or "unpaired": then chosen is a row's own answer, and rejected the next one to another prompt.
      share_prompt: a prompt stands in its row once, which not every model can read: see `models.shares_prompts`.

    Returns:
      (train, eval, report); eval is None without data.eval and data.val_fraction. The report counts the tokens of
      documents, and the learned ones of an answer in its own row alone.

    Raises:
      DataError: rows cannot be used, or are of another kind; there is one unpaired answer, and none to go with it;
        prompts are to be learned.

    Example:
      >>> import pathlib, tempfile
      >>> from jaxsft.data.vocabulary import doctest_tokenizer
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     file = pathlib.Path(folder, "pairs.jsonl")
      ...     _ = file.write_text('{"prompt": "a b", "chosen": " a", "rejected": " b a"}')
      ...     config = Config(train=str(file), max_length=5, cache=folder)
      ...     row = load_pairs(config, doctest_tokenizer(), "preference").train[0]
      >>> [array.astype(int).tolist() for array in (row.tokens, row.positions, row.segments)]
      [[2, 3, 2, 1, 3, 3, 2, 1, 0, 0], [0, 1, 2, 3, 1, 2, 3, 4, 0, 0], [1, 2, 2, 2, 3, 3, 3, 3, 0, 0]]
    """
    if config.learn == "all":
        raise DataError("data.learn is all, and of a pair only the answers are judged; choose answers or last")
    train, held = choose(config, tokenizer, kind)
    rows, efficiency = _pack(train, config, kind, share_prompt, "data.train")
    shared = int(rows.shared[rows.order].sum())
    report = train.report._replace(packed_rows=len(rows), efficiency=efficiency, shared=shared)
    name = "data.eval" if config.eval else "data.val_fraction"
    return LoadedPairs(rows, None if held is None else _pack(held, config, kind, share_prompt, name)[0], report)


def _pack(chosen: Chosen, config: Config, kind: str, share_prompt: bool, name: str) -> tuple[PackedPairs, float]:
    mismatched = config.max_length if kind == "unpaired" else 0
    first = chosen.documents if mismatched else chosen.documents[chosen.documents % 2 == 0]
    first, order = np.unique(first, return_inverse=True)  # a row that comes twice is one pair, twice in the order
    second = first + 1
    if mismatched:
        other = elsewhere([_prompt(pick(chosen.sources, int(number))) for number in first])
        if other is None:
            raise DataError(
                f"{name} has answers to one prompt alone, and each is scored beside that to another; give more rows"
            )
        second = first[other]
    documents = np.stack([first, second], axis=1)
    values = np.concatenate([one.values[one.rows] for one in chosen.sources])[first]
    shared, sizes = _measure(chosen.sources, documents, mismatched, share_prompt)
    length = 2 * config.max_length
    if config.packing:
        places, rows = pack.plan(sizes[order], length)
        order = order[places]
    else:
        length = min(-(-int(sizes.max()) // ALIGN) * ALIGN, length)
        rows = np.arange(len(order) + 1)
    digest = digest_of(chosen.digest, length, config.packing, share_prompt, kind)
    packed = PackedPairs(chosen.sources, documents, values, shared, order, rows, length, digest, mismatched)
    return packed, int(sizes[order].sum()) / (len(packed) * length)


def _measure(
    sources: Sequence[Documents], documents: Int[np.ndarray, "R 2"], mismatched: int, share_prompt: bool
) -> tuple[Int[np.ndarray, "R"], Int[np.ndarray, "R"]]:
    """The tokens of each pair that both documents share, and those that it has in a row."""
    shared, sizes = np.zeros((2, len(documents)), np.int32)
    for number, both in enumerate(documents):
        chosen, rejected = _pair(sources, both, mismatched)
        # The prompt's last token stands in both branches, since it predicts the first one of either.
        shared[number] = max(prompt_length(chosen, rejected) - 1, 0) if share_prompt else 0
        sizes[number] = len(chosen.ids) + len(rejected.ids) - shared[number]
    return shared, sizes


def pairs_in_memory(
    pairs: Sequence[tuple[Example, Example]],
    length: int,
    plan: Sequence[Sequence[int]] | None = None,
    *,
    values: Sequence[float] | None = None,
    share_prompt: bool = True,
) -> PackedPairs:
    """Packed rows of pairs that are at hand: for tests, and for research code with its own data.

    Args:
      pairs: the documents of chosen and rejected.
      length: tokens of a row.
      plan: which pairs lie in which row; one a row by default.
      values: a margin or label each, by default 0.
      share_prompt: as for `load_pairs`.

    Example:
      >>> chosen, rejected = (Example(np.array([1, 2, answer]), np.arange(3) > 1) for answer in (3, 4))
      >>> pairs_in_memory([(chosen, rejected)], 6)[0].tokens
      array([1, 2, 3, 2, 4, 0], dtype=int32)
    """
    source = hold([document for pair in pairs for document in pair])
    documents = np.arange(2 * len(pairs)).reshape(-1, 2)
    shared, _ = _measure([source], documents, 0, share_prompt)
    plan = [[i] for i in range(len(pairs))] if plan is None else plan
    order, rows = np.array([i for row in plan for i in row]), np.cumsum([0, *map(len, plan)])
    known = np.zeros(len(pairs), np.float32) if values is None else np.asarray(values, np.float32)
    return PackedPairs([source], documents, known, shared, order, rows, length, "memory")
