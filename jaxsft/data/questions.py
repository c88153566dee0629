"""Questions to ask a model before and after training, of held-out rows: prompts to answer, answers to choose between,
and gaps to fill."""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from jaxsft.data.chat import Message
from jaxsft.data.pairs import PackedPairs, prompt_length
from jaxsft.data.rows import DataError
from jaxsft.data.script import write
from jaxsft.data.stream import PackedRows
from jaxsft.data.vocabulary import vocabulary

OPENING = 12  # tokens of a plain text that are shown to be continued
PASSAGE, EVERY = 40, 7  # tokens of a text with gaps, and how far those are apart


class Question(NamedTuple):
    text: str  # for people
    ids: list[int]  # for the model
    answer: str  # the row's own


class Comparison(NamedTuple):
    question: Question  # its answer is the chosen one
    rejected: str
    pair: int  # its number in the data


def questions(rows: PackedRows | PackedPairs, tokenizer: Any, count: int) -> list[Question]:
    """Takes `count` documents, evenly over the rows' sources, as questions.

    Of a conversation it is all up to its last learned answer, and `text` is what the user said last; of a text it is
    the opening; of a pair its prompt, and the answer is the chosen one; of unpaired answers those that are wanted.

    Args:
      rows: held out, from `load` or `load_pairs`.
      tokenizer: that they were tokenised with.
      count: how many.
    """
    if isinstance(rows, PackedPairs):
        wanted = np.flatnonzero(rows.values > 0) if rows.mismatched else None
        return [one.question for one in comparisons(rows, tokenizer, count, wanted)]
    found = []
    for document in _spread(np.unique(rows.documents), count):
        ids, mask = rows.document(document)
        if mask[1:].all():  # a text
            opening, rest = ids[:OPENING], ids[OPENING : 4 * OPENING]
            text, answer = (tokenizer.decode(part, skip_special_tokens=True) for part in (opening, rest))
            found.append(Question(text, opening.tolist(), answer))
            continue
        end = int(np.flatnonzero(mask)[-1]) + 1
        start = int(np.flatnonzero(~mask[:end])[-1]) + 1
        answer = tokenizer.decode(ids[start:end], skip_special_tokens=True)
        found.append(Question(said_last(tokenizer.decode(ids[:start]), tokenizer), ids[:start].tolist(), answer))
    return found


def comparisons(rows: PackedPairs, tokenizer: Any, count: int, among: np.ndarray | None = None) -> list[Comparison]:
    """Takes `count` pairs, evenly over the rows' sources: what was asked, and both answers.

    Args:
      rows: held out, from `load_pairs`; of unpaired answers the rejected one is another row's.
      tokenizer: that they were tokenised with.
      count: how many.
      among: the numbers of the pairs to take them from, by default all.
    """
    found = []
    for pair in _spread(np.arange(len(rows.documents)) if among is None else among, count).tolist():
        both = rows.pair(pair)
        start = prompt_length(*both)
        prompt = both[0].ids[:start]
        chosen, rejected = (tokenizer.decode(side.ids[start:], skip_special_tokens=True) for side in both)
        text = said_last(tokenizer.decode(prompt), tokenizer)
        found.append(Comparison(Question(text, prompt.tolist(), chosen), rejected, pair))
    return found


def blanks(rows: PackedRows, tokenizer: Any, count: int) -> list[Question]:
    """Takes `count` documents, evenly over the rows' sources, as texts with gaps; `answer` is what stood there.

    Args:
      rows: held out, from `load` with kind "masked".
      tokenizer: that they were tokenised with; it has a mask token.
      count: how many.
    """
    found = []
    for document in _spread(np.unique(rows.documents), count):
        ids, mask = (array[:PASSAGE].copy() for array in rows.document(document))
        inside = np.flatnonzero(mask)
        gaps = inside[min(EVERY, len(inside)) // 2 :: EVERY]
        answer = ", ".join(tokenizer.decode([token]).strip() for token in ids[gaps])
        ids[gaps] = tokenizer.mask_token_id
        found.append(Question(tokenizer.decode(ids[inside]), ids.tolist(), answer))
    return found


def _spread(numbers: Int[np.ndarray, "N"], count: int) -> Int[np.ndarray, "_"]:
    """Some of them, evenly over all."""
    count = min(count, len(numbers))
    return numbers[np.unique(np.linspace(0, len(numbers) - 1, count).round().astype(int)) if count else []]


def said_last(prompt: str, tokenizer: Any) -> str:
    """The last words of the user in a prompt: what stands between what the template writes around them."""
    head = ""
    try:
        asked = write((Message("user", "\ufdd0"),), (), tokenizer, add_generation_prompt=True)
    except DataError:
        return prompt
    before, _, after = asked.partition("\ufdd0")
    for special in vocabulary(tokenizer).pattern.finditer(before):  # what opens the turn, and not the conversation
        head = before[special.end() if special[0] == tokenizer.bos_token else special.start() :]
    head = head or before
    return prompt.rpartition(head)[2].removesuffix(after) if head and head in prompt else prompt
