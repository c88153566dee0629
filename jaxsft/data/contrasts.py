"""Questions and passages as token ids, which become rows of `Contrasts`: everything at one width, so one program."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from jaxsft.types import Contrasts

ALIGN = 8  # lengths are multiples of this


@dataclass(frozen=True)
class ContrastRows(Sequence[Contrasts]):
    """Rows of `Contrasts`, put together when asked for.

    Example:
      >>> rows = ContrastRows([[5, 6]], [[7], [8, 9]], np.array([[1, 0, -1]]), "memory")
      >>> rows[0].passages[:, :3].tolist(), rows[0].passage_sizes.tolist(), rows[0].texts.tolist()
      ([[8, 9, 0], [7, 0, 0], [0, 0, 0]], [2, 1, 0], [1, 0, -1])
    """

    questions: Sequence[Sequence[int]]  # token ids
    passages: Sequence[Sequence[int]]
    candidates: Int[np.ndarray, "R P"]  # numbers of passages, the right one first; -1 for none
    digest: str
    sources: tuple = ()

    def __len__(self) -> int:
        return len(self.questions)

    def __getitem__(self, i: int) -> Contrasts:  # type: ignore[override]
        i = range(len(self))[i]
        numbers = self.candidates[i]
        query, query_size = _fill([self.questions[i]], _width(self.questions))
        found, sizes = _fill([self.passages[n] if n >= 0 else [] for n in numbers], _width(self.passages))
        return Contrasts(query[0], query_size, found, sizes, numbers.astype(np.int32))  # type: ignore[arg-type]

    def empty(self) -> Contrasts:
        """A row that fills up a batch."""
        none = self[0]
        return Contrasts(*(np.zeros_like(x) for x in none[:4]), np.full_like(none.texts, -1))  # type: ignore[arg-type]


def _width(texts: Sequence[Sequence[int]]) -> int:
    return -(-max(map(len, texts)) // ALIGN) * ALIGN


def _fill(texts: Sequence[Sequence[int]], width: int) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.zeros((len(texts), width), np.int32)
    for row, text in enumerate(texts):
        tokens[row, : len(text)] = text
    return tokens, np.array([len(text) for text in texts], np.int32)
