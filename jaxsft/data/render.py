"""From a record to token ids, and which of them are learned.

A conversation is written once by the tokenizer's chat template and tokenised once. What is learned is told by
characters, not by searching for token ids: a turn of the assistant begins where its generation prompt ends, it ends
with its stop token, and the tokens inside are learned.

    tokens   <|im_start|> user \\n hi <|im_end|> \\n <|im_start|> assistant \\n hello <|im_end|> \\n <|im_start|> ...
    learned       0        0   0  0      0      0       0           0      0    1       1      0        0

Where a token would lie across such an edge, the text is tokenised in pieces, as it is when a model answers. The ids are
those the template writes, so there is one BOS if it writes one. What people wrote stays text: `<|im_end|>` inside a
message does not become the control token, but is spelled.
"""

import re
from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from jaxsft.data.chat import Conversation, Message, Prompt, Text, Tools
from jaxsft.data.script import AS_USUAL, How, Script, scripts
from jaxsft.data.vocabulary import Vocabulary, vocabulary

if TYPE_CHECKING:
    from tokenizers import Encoding

THOUGHT = re.compile(r"(?:<think>|\A)(?:(?!<think>).)*?</think>\s*", re.DOTALL)  # a template may have opened it


class Example(NamedTuple):
    """A tokenised document: ids, and which of them are learned."""

    ids: Int[np.ndarray, "N"]
    mask: Bool[np.ndarray, "N"]


class Rendered(NamedTuple):
    """An example, with where its answers are: the turns that truncation goes by, whatever of them is learned."""

    ids: Int[np.ndarray, "N"]
    mask: Bool[np.ndarray, "N"]
    answers: Bool[np.ndarray, "N"]


def render(conversation: Conversation, tokenizer: Any, how: How = AS_USUAL) -> Example:
    """Tokenises a conversation; the assistant's words and stop tokens are learned, in every turn.

    Args:
      conversation: the turns.
      tokenizer: a fast tokenizer of transformers with a chat template.
      how: a system message, and what else is learned, or is not.

    Returns:
      ids int32 and mask, up to the last learned token: nothing learns from what the template writes after it.

    Raises:
      DataError: the template refuses the conversation, leaves out part of it, or does not write it turn by turn; the
        tokenizer is not fast.

    Example:
      >>> from tokenizers import Tokenizer, models, pre_tokenizers
      >>> from transformers import PreTrainedTokenizerFast
      >>> from jaxsft.data.templates import with_template
      >>> words = "? </s> ### Instruction: Response: hi hello".split()
      >>> core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "?"))
      >>> core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
      >>> tokenizer = with_template(PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>"))
      >>> example = render(Conversation((Message("user", "hi"), Message("assistant", "hello"))), tokenizer)
      >>> " ".join(words[i] for i in example.ids), example.mask.astype(int).tolist()
      ('### Instruction: hi ### Response: hello </s>', [0, 0, 0, 0, 0, 1, 1])
    """
    (rendered,) = encode(scripts(conversation, tokenizer, how), tokenizer, how)
    return Example(rendered.ids, rendered.mask)


def render_text(text: Text, tokenizer: Any) -> Example:
    """Tokenises a plain document: a BOS (or else EOS) to predict the first token from, the text, an EOS; all learned.

        tokens   <s> once upon a time </s>
        learned   0   1    1   1   1    1

    Raises:
      DataError: the tokenizer has no EOS.

    Example:
      >>> from tokenizers import Tokenizer, models, pre_tokenizers
      >>> from transformers import PreTrainedTokenizerFast
      >>> core = Tokenizer(models.WordLevel({"</s>": 0, "once": 1, "upon": 2}, "</s>"))
      >>> core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
      >>> example = render_text(Text("once upon"), PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>"))
      >>> example.ids.tolist(), example.mask.astype(int).tolist()
      ([0, 1, 2, 0], [0, 1, 1, 1])
    """
    (rendered,) = encode(scripts(text, tokenizer), tokenizer)
    return Example(rendered.ids, rendered.mask)


def prompt_ids(prompt: str | Sequence[Message], tokenizer: Any, *, tools: Tools = ()) -> list[int]:
    """Tokenises a conversation up to where the assistant begins to answer, as `render` writes it; or a plain text.

    Example:
      >>> from tokenizers import Tokenizer, models, pre_tokenizers
      >>> from transformers import PreTrainedTokenizerFast
      >>> from jaxsft.data.templates import with_template
      >>> core = Tokenizer(models.WordLevel({"?": 0, "###": 1, "Instruction:": 2, "Response:": 3, "hi": 4}, "?"))
      >>> core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
      >>> prompt_ids([Message("user", "hi")], with_template(PreTrainedTokenizerFast(tokenizer_object=core)))
      [1, 2, 4, 1, 3]
    """
    asked = Prompt(prompt if isinstance(prompt, str) else tuple(prompt), tools)
    (rendered,) = encode(scripts(asked, tokenizer), tokenizer)
    return rendered.ids.tolist()


def encode(found: Sequence[Script], tokenizer: Any, how: How = AS_USUAL) -> list[Rendered]:
    """Tokenises texts, all at once, and tells what is learned.

    Returns:
      one for each script, up to its last learned token; scripts without answers whole, nothing of them learned.

    Example:
      >>> from jaxsft.data.chat import Completion
      >>> from jaxsft.data.vocabulary import doctest_tokenizer
      >>> tokenizer = doctest_tokenizer()
      >>> encode(scripts(Completion("a", " b"), tokenizer), tokenizer)[0].mask
      array([False, True, True])
    """
    known = vocabulary(tokenizer)
    plain = [script.text for script in found if not script.mark]
    encodings = iter(known.core.encode_batch(plain, add_special_tokens=False))
    rendered = []
    for script in found:
        encoding = None if script.mark else next(encodings)
        if encoding is None or _needs_pieces(script, encoding, known):
            rendered.append(_masked(*_in_pieces(script, known), known, how))
        else:
            rendered.append(_masked(script, encoding, known, how))
    return rendered


def _masked(script: Script, encoding: "Encoding | Pieces", known: Vocabulary, how: How) -> Rendered:
    skip = 0 if script.opening is None else 1
    ids = np.array([*[script.opening] * skip, *encoding.ids], np.int32)
    mask, answers = np.zeros(len(ids), bool), np.zeros(len(ids), bool)
    for number, (start, end) in enumerate(script.answers):
        first, last = _next_token(encoding, start), _next_token(encoding, end)
        special = (token for token in range(last - 1, first - 1, -1) if int(encoding.ids[token]) in known.special)
        stop = next(special, None)
        if stop is not None and not script.text[_chars(encoding, stop)[1] : end].strip():
            last = stop + 1  # the newline behind it is not the model's to write
        answers[skip + first : skip + last] = script.learn[number]
        learns = script.learn[number] and (how.learn != "last" or number == len(script.answers) - 1)
        mask[skip + first : skip + last] = learns
    if how.learn == "all":
        mask[: np.flatnonzero(answers)[-1] + 1 if answers.any() else 0] = True
    if how.reasoning == "mask":
        for start, end in script.answers:
            for thought in THOUGHT.finditer(script.text[start:end]):
                mask[slice(*(skip + _next_token(encoding, start + at) for at in thought.span()))] = False
    mask[:1] = False  # nothing comes before the first token to predict it from
    length = np.flatnonzero(mask)[-1] + 1 if mask.any() else len(ids)
    return Rendered(ids[:length], mask[:length], answers[:length])


def _needs_pieces(script: Script, encoding: "Encoding", known: Vocabulary) -> bool:
    """Whether a model that answers would be asked with other tokens than these."""
    across = any(_lies_across(encoding, at) for span in script.answers for at in span)
    return across or any(_looks_ahead(script.text, encoding, start, known) for start, _ in script.answers)


def _looks_ahead(text: str, encoding: "Encoding", at: int, known: Vocabulary) -> bool:
    """Whether the white space before an answer has other tokens because of what follows, as GPT-2's pattern has it."""
    begin = len(text[:at].rstrip())
    if at - begin < 2:
        return False
    ids = encoding.ids[_next_token(encoding, begin) : _next_token(encoding, at)]
    return ids != known.core.encode(text[begin:at], add_special_tokens=False).ids


def _lies_across(encoding: "Encoding", at: int) -> bool:
    """Whether a token begins before a character and ends behind it."""
    token = _next_token(encoding, at)
    begin, end = _chars(encoding, token - 1) if token else (0, 0)
    return begin < at < end


def _next_token(encoding: "Encoding | Pieces", at: int) -> int:
    """The first token that begins at a character or behind it."""
    if isinstance(encoding, Pieces):
        return bisect_left(encoding.begins, at)
    size = len(encoding)
    end = _chars(encoding, size - 1)[1] if size else 0
    for place in range(at, end):  # one step, but for what the tokenizer's normalizer drops
        token = encoding.char_to_token(place)
        if token is not None:
            while token < size and _chars(encoding, token)[0] < at:
                token += 1
            return token
    return size


def _chars(encoding: "Encoding | Pieces", token: int) -> tuple[int, int]:
    return encoding.token_to_chars(token) or (0, 0)


class Pieces(NamedTuple):
    """Ids and offsets of a text that was tokenised in pieces."""

    ids: list[int]
    begins: list[int]
    ends: list[int]

    def token_to_chars(self, token: int) -> tuple[int, int]:
        return self.begins[token], self.ends[token]


def _in_pieces(script: Script, known: Vocabulary) -> tuple[Script, Pieces]:
    """Tokenises between the edges of answers and special tokens; what is marked is read as text, and the marks go."""
    text, mark, pieces = script.text, script.mark, Pieces([], [], [])
    marks = [i for i, character in enumerate(text) if character == mark] if mark else []
    move = lambda at: at - bisect_left(marks, at)  # a place in the text with marks -> in the one without
    controls = {found.start(): found for found in known.pattern.finditer(text)}
    cuts = {0, len(text), *(at for span in script.answers for at in span)}
    for control in controls.values():  # the white space that a token swallows is not cut off
        cuts = {at for at in cuts if not control.start() < at < control.end()} | set(control.span())
    core: Any = known.core
    core.encode_special_tokens = True
    try:
        for first, last in pairwise(sorted(cuts)):
            if first in controls:
                new = [(known.ids[controls[first].group().strip()], move(first), move(last))]
            else:
                lead = known.prefix if first else ""
                piece = lead + (text[first:last].replace(mark, "") if mark else text[first:last])
                encoding, start = core.encode(piece, add_special_tokens=False), move(first) - len(lead)
                found = zip(encoding.ids, encoding.offsets, strict=True)
                new = [(number, start + begin, start + end) for number, (begin, end) in found if end > len(lead)]
            for values, more in zip(pieces, zip(*new, strict=True), strict=False):
                values.extend(more)
    finally:
        core.encode_special_tokens = False
    answers = tuple((move(first), move(last)) for first, last in script.answers)
    return script._replace(text=text.replace(mark, "") if mark else text, answers=answers, mark=""), pieces
