"""Questions to ask a model before and after training, of held-out rows: prompts to answer, and gaps to fill."""

from typing import Any, NamedTuple

import numpy as np

from jaxsft.data.chat import Message
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


def questions(rows: PackedRows, tokenizer: Any, count: int) -> list[Question]:
    """Takes `count` documents, evenly over the rows' sources, as questions.

    Of a conversation it is all up to its last learned answer, and `text` is what the user said last; of a text it is
    the opening.

    Args:
      rows: held out, from `load`.
      tokenizer: that they were tokenised with.
      count: how many.
    """
    found = []
    for document in _chosen(rows, count):
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


def blanks(rows: PackedRows, tokenizer: Any, count: int) -> list[Question]:
    """Takes `count` documents, evenly over the rows' sources, as texts with gaps; `answer` is what stood there.

    Args:
      rows: held out, from `load` with kind "masked".
      tokenizer: that they were tokenised with; it has a mask token.
      count: how many.
    """
    found = []
    for document in _chosen(rows, count):
        ids, mask = (array[:PASSAGE].copy() for array in rows.document(document))
        inside = np.flatnonzero(mask)
        gaps = inside[min(EVERY, len(inside)) // 2 :: EVERY]
        answer = ", ".join(tokenizer.decode([token]).strip() for token in ids[gaps])
        ids[gaps] = tokenizer.mask_token_id
        found.append(Question(tokenizer.decode(ids[inside]), ids.tolist(), answer))
    return found


def _chosen(rows: PackedRows, count: int) -> np.ndarray:
    """Documents, evenly over all."""
    documents = np.unique(rows.documents)
    return documents[np.unique(np.linspace(0, len(documents) - 1, count).round().astype(int)) if count else []]


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
