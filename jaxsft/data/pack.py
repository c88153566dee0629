"""Documents into rows of one length: cut, place, fill.

A conversation that is too long loses words by LLaMA-Factory's rule; a text that is too long becomes several pieces
that lose none. Documents are placed best fit, longest first (Johnson et al. 1974, doi:10.1137/0203025), and segment
numbers keep them apart.
"""

import array
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Bool, Int

from jaxsft.data.render import Example, Rendered
from jaxsft.types import Tokens


def truncate(
    example: Example, max_length: int, *, answers: Bool[np.ndarray, "N"] | None = None, last_first: bool = False
) -> Example:
    """Cuts a conversation turn by turn, each as question and answer share the room that is left, ends first.

        2 * answer < room      the question is cut
        2 * question < room    the answer is cut
        else                   both, in proportion

    Args:
      example: a rendered conversation.
      max_length: tokens to keep at most.
      answers: where its answers are, if they are not what is learned.
      last_first: room goes to the last turn first, and the first turns are lost; otherwise the other way round.

    Example:
      >>> question_and_answer = Example(np.arange(10), np.arange(10) >= 8)
      >>> truncate(question_and_answer, 6).ids.tolist()
      [0, 1, 2, 3, 8, 9]
    """
    if len(example.ids) <= max_length:
        return example
    answers = example.mask if answers is None else answers
    edges = np.flatnonzero(np.diff(answers.astype(np.int8), prepend=0, append=0)).reshape(-1, 2)
    begins = [0, *edges[:, 1]][: len(edges)]
    keep, room = [np.arange(0)], max_length
    turns = list(zip(begins, *edges.T, strict=True))
    for begin, start, stop in reversed(turns) if last_first else turns:
        question, answer = _shares(start - begin, stop - start, room)
        keep += [np.arange(begin, begin + question), np.arange(start, start + answer)]
        room -= question + answer
    kept = np.sort(np.concatenate(keep))
    return Example(example.ids[kept], example.mask[kept])


def truncate_pair(chosen: Rendered, rejected: Rendered, max_length: int) -> tuple[Example, Example]:
    """Cuts both answers to one prompt alike: the prompt, the answers or both lose their ends, as `truncate` does.

    Raises:
      ValueError: the prompts differ.

    Example:
      >>> side = lambda answer: Rendered(np.arange(4 + answer), *(2 * [np.arange(4 + answer) >= 4]))
      >>> [cut.ids.tolist() for cut in truncate_pair(side(2), side(4), 6)]
      [[0, 1, 2, 4, 5], [0, 1, 2, 4, 5, 6]]
    """
    start = int(np.argmax(chosen.answers))
    longest = max(len(chosen.ids), len(rejected.ids)) - start
    cut = []
    for side in (chosen, rejected):
        if int(np.argmax(side.answers)) != start or (side.ids[:start] != chosen.ids[:start]).any():
            raise ValueError("chosen and rejected do not begin with the same prompt")
        if start + longest <= max_length:
            cut.append(Example(side.ids, side.mask))
            continue
        prompt, answer = _shares(start, longest, max_length)
        kept = np.r_[:prompt, start : min(start + answer, len(side.ids))]
        cut.append(Example(side.ids[kept], side.mask[kept]))
    return cut[0], cut[1]


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


def passages(example: Example, max_length: int) -> list[Example]:
    """Splits a text for an encoder into pieces of about one length, each between the text's first and last token.

        [ a b c d e ]  ->  [ a b c ]   [ d e ]
        0 1 1 1 1 1 1      0 1 1 1 0   0 1 1 0     the token that ends a text is not learned

    Example:
      >>> pieces = passages(Example(np.array([1, 5, 6, 7, 8, 9, 2]), np.array([0, 1, 1, 1, 1, 1, 1]) > 0), 5)
      >>> [(piece.ids.tolist(), piece.mask.astype(int).tolist()) for piece in pieces]
      [([1, 5, 6, 7, 2], [0, 1, 1, 1, 0]), ([1, 8, 9, 2], [0, 1, 1, 0])]
    """
    count = -(-(len(example.ids) - 2) // (max_length - 2))
    ends, no = example.ids[[0, -1]], np.zeros(1, bool)
    cut = zip(*(np.array_split(array[1:-1], count) for array in example), strict=True)
    return [Example(np.r_[ends[:1], ids, ends[1:]], np.r_[no, mask, no]) for ids, mask in cut]


def plan(lengths: Int[np.ndarray, "D"], max_length: int) -> tuple[Int[np.ndarray, "D"], Int[np.ndarray, "R+1"]]:
    """Places documents in as few rows as best fit, longest first, finds.

    Memory is a few integers a document and a row; rows that have the same space left are a linked list.

    Args:
      lengths: tokens of each document, none above `max_length`.
      max_length: tokens of a row.

    Returns:
      (order, rows): the numbers of the documents, row by row, and where in `order` each row begins, and the end.

    Raises:
      ValueError: a document is longer than a row.

    Example:
      >>> [array.tolist() for array in plan(np.array([3, 5, 2, 6]), 8)]
      [[3, 2, 1, 0], [0, 2, 4]]
    """
    lengths = np.asarray(lengths, np.int32)
    if lengths.size and lengths.max() > max_length:
        raise ValueError(
            f"a document has {lengths.max()} tokens, a row {max_length}; truncate it or cut it into chunks"
        )
    if lengths.size and lengths.min() < 1:
        raise ValueError("a document has no tokens; leave it out")
    longest_first = np.argsort(-lengths, kind="stable").astype(np.int32)
    free: list[int] = []  # the amounts of space there are, in order
    having = [-1] * (max_length + 1)  # the last row that has so much, -1 for none
    before = array.array("q")  # the row that has as much as this one, and was there before it
    row_of = np.empty(len(lengths), np.int32)
    for document, length in _pairs(longest_first, lengths):
        at = bisect_left(free, length)
        if at == len(free):
            row, space = len(before), max_length
            before.append(-1)
        else:
            space = free[at]
            row = having[space]
            having[space] = before[row]
            if having[space] < 0:
                del free[at]
        row_of[document] = row
        left = space - length
        if left:
            if having[left] < 0:
                insort(free, left)
            before[row], having[left] = having[left], row
    order = longest_first[np.argsort(row_of[longest_first], kind="stable")]
    return order, np.concatenate([[0], np.cumsum(np.bincount(row_of, minlength=len(before)))]).astype(np.int64)


def _pairs(documents: Int[np.ndarray, "D"], lengths: Int[np.ndarray, "D"]) -> Iterator[tuple[int, int]]:
    """Documents with their lengths as Python integers, which are large: some at a time."""
    for start in range(0, len(documents), 1 << 16):
        some = documents[start : start + (1 << 16)]
        yield from zip(some.tolist(), lengths[some].tolist(), strict=True)


def fill(examples: Sequence[Example], length: int, firsts: Sequence[int] | None = None) -> Tokens:
    """Writes documents side by side into one row, as `Tokens` shows it.

    Args:
      examples: the documents; an empty one takes a number and no room.
      length: tokens of the row.
      firsts: the position at which each of them begins; by default 0.

    Returns:
      Tokens of arrays [length]: segments count from 1, padding is 0 in all four.

    Example:
      >>> ab, cde = Example(np.array([1, 2]), np.array([0, 1])), Example(np.array([3, 4, 5]), np.array([0, 1, 1]))
      >>> [array.astype(int).tolist() for array in fill([ab, cde], 6)]
      [[1, 2, 3, 4, 5, 0], [0, 1, 0, 1, 1, 0], [0, 1, 0, 1, 2, 0], [1, 1, 2, 2, 2, 0]]
    """
    row = Tokens(*(np.zeros(length, kind) for kind in (np.int32, bool, np.int32, np.int32)))  # type: ignore[arg-type]
    at = 0
    firsts = [0] * len(examples) if firsts is None else firsts
    for number, ((ids, mask), first) in enumerate(zip(examples, firsts, strict=True), 1):
        here = slice(at, at + len(ids))
        for place, values in zip(row, (ids, mask, first + np.arange(len(ids)), number), strict=True):
            place[here] = values  # type: ignore[index]
        at += len(ids)
    return row
