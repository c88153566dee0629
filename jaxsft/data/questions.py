"""Questions to ask a model before and after training: the prompts of held-out rows, and the answers they want."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxsft.data import chat, formats
from jaxsft.data.sources import read

OPENING = 12  # tokens of a plain text that are shown to be continued


class Question(NamedTuple):
    text: str  # for people
    ids: list[int]  # for the model
    answer: str  # the row's own


def questions(source: str | Sequence[str], tokenizer: Any, format: str, count: int) -> list[Question]:
    """Takes `count` rows, evenly over the source, as questions: a conversation up to its last answer, a text's opening.

    Example:
      >>> from tokenizers import Tokenizer, models, pre_tokenizers
      >>> from transformers import PreTrainedTokenizerFast
      >>> core = Tokenizer(models.WordLevel({"</s>": 0, "?": 1}, "?"))
      >>> tokenizer = chat.with_template(PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>"))
      >>> [q.answer for q in questions("jaxsft/assets/quickstart/train.jsonl", tokenizer, "auto", 1)]
      ['您好我是微调后的大模型']
    """
    rows = read(source)
    chosen = np.unique(np.linspace(0, len(rows) - 1, count).round().astype(int)) if count else []
    found = []
    for row in (rows[i] for i in chosen):
        parsed = formats.parse(row.fields, format)
        if isinstance(parsed, chat.Text):
            ids = chat.render_text(parsed, tokenizer).ids.tolist()
            opening, rest = ids[:OPENING], ids[OPENING : 4 * OPENING]
            text, answer = (tokenizer.decode(part, skip_special_tokens=True) for part in (opening, rest))
            found.append(Question(text, opening, answer))
        else:
            *before, last = parsed.messages
            text = "\n".join(message.content for message in before)
            found.append(Question(text, chat.prompt_ids(before, tokenizer), last.content))
    return found
