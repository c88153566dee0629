"""Documents into rows of one length: cut, place, fill.

A conversation that is too long loses words by LLaMA-Factory's rule; a text that is too long becomes several pieces
that lose none. Documents are placed best fit, longest first (Johnson et al. 1974, doi:10.1137/0203025), and segment
numbers keep them apart.
"""

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from jaxsft.data.chat import Example
from jaxsft.types import Tokens


def truncate(example: Example, max_length: int) -> Example:
    """Cuts a conversation turn by turn, each as question and answer share the room that is left, ends first.

        2 * answer < room      the question is cut
        2 * question < room    the answer is cut
        else                   both, in proportion

    Args:
      example: a rendered conversation.
      max_length: tokens to keep at most.

    Example:
      >>> question_and_answer = Example(np.arange(10), np.arange(10) >= 8)
      >>> truncate(question_and_answer, 6).ids.tolist()
      [0, 1, 2, 3, 8, 9]
    """
    if len(example.ids) <= max_length:
        return example
    keep, room, at = [np.arange(0)], max_length, 0
    edges = np.flatnonzero(np.diff(example.mask.astype(np.int8), prepend=0, append=0))
    for start, stop in edges.reshape(-1, 2):
        question, answer = _shares(start - at, stop - start, room)
        keep += [np.arange(at, at + question), np.arange(start, start + answer)]
        room, at = room - question - answer, stop
    kept = np.concatenate(keep)
    return Example(example.ids[kept], example.mask[kept])


def _shares(question: int, answer: int, room: int) -> tuple[int, int]:
    """`infer_seqlen` of LLaMA-Factory, data/processor/processor_utils.py."""
    if 2 * answer < room:
        most = room
    elif 2 * question < room:
        most = room - question
    else:
        most = int(room * (answer / (question + answer)))
    answer = min(most, answer)
    return min(max(room - answer, 0), question), answer


def chunks(example: Example, max_length: int) -> list[Example]:
    """Splits a text into pieces that overlap by one token of context, so that each token is learned exactly once.

        a b c d e  ->  a b c   c d e
        0 1 1 1 1      0 1 1   0 1 1

    Example:
      >>> [piece.ids.tolist() for piece in chunks(Example(np.arange(6), np.arange(6) > 0), 3)]
      [[0, 1, 2], [2, 3, 4], [4, 5]]
    """
    pieces = []
    for start in range(0, max(len(example.ids) - 1, 1), max_length - 1):
        ids, mask = (array[start : start + max_length] for array in example)
        pieces.append(Example(ids, mask & (np.arange(len(ids)) > 0)))
    return pieces


def plan(lengths: Sequence[int], max_length: int) -> list[list[int]]:
    """Places documents in as few rows as best fit, longest first, finds.

    Args:
      lengths: tokens of each document, none above `max_length`.
      max_length: tokens of a row.

    Returns:
      for each row, the numbers of its documents.

    Raises:
      ValueError: a document is longer than a row.

    Example:
      >>> plan([3, 5, 2, 6], 8)
      [[3, 2], [1, 0]]
    """
    if max(lengths, default=0) > max_length:
        raise ValueError(f"a document has {max(lengths)} tokens, a row {max_length}; truncate it or cut it into chunks")
    rows: list[list[int]] = []
    free: list[int] = []  # the amounts of space there are, in order
    having: defaultdict[int, list[int]] = defaultdict(list)  # the rows that have so much
    for document in np.argsort(-np.asarray(lengths, np.int64), kind="stable").tolist():
        length = int(lengths[document])
        at = bisect_left(free, length)
        if at == len(free):
            row, space = len(rows), max_length
            rows.append([])
        else:
            space = free[at]
            row = having[space].pop()
            if not having[space]:
                del free[at]
        rows[row].append(document)
        left = space - length
        if left:
            if not having[left]:
                insort(free, left)
            having[left].append(row)
    return rows


def fill(examples: Sequence[Example], length: int) -> Tokens:
    """Writes documents side by side into one row, as `Tokens` shows it.

    Returns:
      Tokens of arrays [length]: segments count from 1, padding is 0 in all four.

    Example:
      >>> ab, cde = Example(np.array([1, 2]), np.array([0, 1])), Example(np.array([3, 4, 5]), np.array([0, 1, 1]))
      >>> [array.astype(int).tolist() for array in fill([ab, cde], 6)]
      [[1, 2, 3, 4, 5, 0], [0, 1, 0, 1, 1, 0], [0, 1, 0, 1, 2, 0], [1, 1, 2, 2, 2, 0]]
    """
    row = Tokens(*(np.zeros(length, kind) for kind in (np.int32, bool, np.int32, np.int32)))  # type: ignore[arg-type]
    at = 0
    for number, (ids, mask) in enumerate(examples, 1):
        here = slice(at, at + len(ids))
        for array, values in zip(row, (ids, mask, np.arange(len(ids)), number), strict=True):
            array[here] = values  # type: ignore[index]
        at += len(ids)
    return row
