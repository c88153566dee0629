"""From a conversation to token ids, and which of them are learned.

The whole conversation is written once by the tokenizer's chat template and tokenised once. What is learned is told by
characters, not by searching for token ids: a turn of the assistant begins where its generation prompt ends, it ends
with its stop token, and the tokens inside are learned.

    tokens   <|im_start|> user \\n hi <|im_end|> \\n <|im_start|> assistant \\n hello <|im_end|> \\n <|im_start|> ...
    learned       0        0   0  0      0      0       0           0      0    1       1      0        0

The ids are those the template writes, so there is one BOS if it writes one. A plain text is learned whole.
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from jaxsft.data.sources import DataError

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")

DEFAULT_TEMPLATE = """\
{{- bos_token if bos_token else '' -}}
{%- for message in messages -%}
{%- if message.role == 'assistant' -%}
{{- '### Response:\\n' + message.content + (eos_token if eos_token else '') + '\\n\\n' -}}
{%- else -%}
{{- ('### Instruction:\\n' if message.role == 'user' else '') + message.content + '\\n\\n' -}}
{%- endif -%}
{%- endfor -%}
{{- '### Response:\\n' if add_generation_prompt else '' -}}
"""


class Message(NamedTuple):
    """One turn."""

    role: str  # system, user or assistant
    content: str


class Conversation(NamedTuple):
    """Turns, of which those of the assistant are learned."""

    messages: tuple[Message, ...]


class Text(NamedTuple):
    """A plain document, learned whole."""

    text: str


class Example(NamedTuple):
    """A tokenised document: ids, and which of them are learned."""

    ids: Int[np.ndarray, "N"]
    mask: Bool[np.ndarray, "N"]


def with_template(tokenizer: Any) -> Any:
    """Gives a tokenizer that has no chat template the default one, and returns it.

    Example:
      >>> from types import SimpleNamespace
      >>> with_template(SimpleNamespace(chat_template=None)).chat_template == DEFAULT_TEMPLATE
      True
    """
    if not tokenizer.chat_template:
        tokenizer.chat_template = DEFAULT_TEMPLATE
    return tokenizer


def render(conversation: Conversation, tokenizer: Any) -> Example:
    """Tokenises a conversation; the assistant's words and stop tokens are learned, in every turn.

    Args:
      conversation: the turns.
      tokenizer: a fast tokenizer of transformers with a chat template.

    Returns:
      ids int32 and mask, up to the last learned token: nothing learns from what the template writes after it.

    Raises:
      DataError: the template refuses the conversation or does not write it turn by turn; the tokenizer is not fast.

    Example:
      >>> from tokenizers import Tokenizer, models, pre_tokenizers
      >>> from transformers import PreTrainedTokenizerFast
      >>> words = "? </s> ### Instruction: Response: hi hello".split()
      >>> core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "?"))
      >>> core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
      >>> tokenizer = with_template(PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>"))
      >>> example = render(Conversation((Message("user", "hi"), Message("assistant", "hello"))), tokenizer)
      >>> " ".join(words[i] for i in example.ids), example.mask.astype(int).tolist()
      ('### Instruction: hi ### Response: hello </s>', [0, 0, 0, 0, 0, 1, 1])
    """
    if not tokenizer.is_fast:
        raise DataError(
            f"{type(tokenizer).__name__} gives no character offsets, so what is learned cannot be told; "
            "use the fast tokenizer of this model, one with a tokenizer.json"
        )
    messages = conversation.messages
    full = _write(messages, tokenizer)
    encoded = tokenizer(full, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids = np.array(encoded["input_ids"], np.int32)
    begin, end = np.array(encoded["offset_mapping"], np.int32).reshape(-1, 2).T
    stops = np.isin(ids, _special(tokenizer))
    mask = np.zeros(len(ids), bool)
    for first, last in _spans(messages, full, tokenizer):
        # All bytes of one character have that character's offsets, so they are in or out together. A space whose
        # offsets were trimmed to nothing lies before them: `end > first` leaves it in the prompt.
        inside = (begin >= first) & (end > first) & (end <= last)
        for stop in np.flatnonzero(inside & stops)[-1:]:
            if not full[end[stop] : last].strip():  # only a newline follows, which is not the model's to write
                inside[stop + 1 :] = False
        mask |= inside
    mask[:1] = False  # nothing comes before the first token to predict it from
    length = np.flatnonzero(mask)[-1] + 1 if mask.any() else len(ids)
    return Example(ids[:length], mask[:length])


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
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if eos is None:
        raise DataError("the tokenizer has no eos_token to end a text with; name one in tokenizer_config.json")
    ids = tokenizer(text.text, add_special_tokens=False, verbose=False)["input_ids"]
    ids = np.array([eos if bos is None else bos, *ids, eos], np.int32)
    return Example(ids, np.arange(len(ids)) > 0)


def prompt_ids(messages: Sequence[Message], tokenizer: Any) -> list[int]:
    """Tokenises a conversation up to where the assistant begins to answer, as `render` writes it.

    Example:
      >>> from tokenizers import Tokenizer, models, pre_tokenizers
      >>> from transformers import PreTrainedTokenizerFast
      >>> core = Tokenizer(models.WordLevel({"?": 0, "###": 1, "Instruction:": 2, "Response:": 3, "hi": 4}, "?"))
      >>> core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
      >>> prompt_ids([Message("user", "hi")], with_template(PreTrainedTokenizerFast(tokenizer_object=core)))
      [1, 2, 4, 1, 3]
    """
    text = _write(messages, tokenizer, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _write(messages: Sequence[Message], tokenizer: Any, **options: Any) -> str:
    from jinja2 import TemplateError

    turns = [message._asdict() for message in messages]
    try:
        return tokenizer.apply_chat_template(turns, tokenize=False, **options)
    except TemplateError as error:
        roles = ", ".join(message.role for message in messages)
        raise DataError(f"the chat template refuses turns {roles} ({error}); change the row or the template") from error


def _special(tokenizer: Any) -> list[int]:
    added = tokenizer.added_tokens_decoder
    return [*tokenizer.all_special_ids, *(number for number, token in added.items() if token.special)]


def _spans(messages: Sequence[Message], full: str, tokenizer: Any) -> list[tuple[int, int]]:
    """First and last + 1 character of each turn of the assistant, stop token and what follows it included."""
    turns = [i for i, message in enumerate(messages) if message.role == "assistant"]
    spans = [_span(messages, i, full, tokenizer) for i in turns]
    if None not in spans:
        return spans  # type: ignore[return-value]
    template = tokenizer.get_chat_template()
    if GENERATION.search(template):
        from transformers.utils.chat_template_utils import render_jinja_template

        written = [message._asdict() for message in messages]
        options = {"chat_template": template, "return_assistant_tokens_mask": True, **tokenizer.special_tokens_map}
        return render_jinja_template([written], **options)[1][0]  # type: ignore[return-value]
    raise DataError(
        f"the chat template does not write message {turns[spans.index(None)] + 1} as an addition to those before it, "
        "so what is learned cannot be told; mark the assistant's words in it with {% generation %}"
    )


def _span(messages: Sequence[Message], i: int, full: str, tokenizer: Any) -> tuple[int, int] | None:
    prompt = _write(messages[:i], tokenizer, add_generation_prompt=True)
    upto = full if i + 1 == len(messages) else _write(messages[: i + 1], tokenizer)
    if not (full.startswith(prompt) and upto.startswith(prompt)):
        return None
    start, turn = len(prompt), upto[len(prompt) :]
    if full.startswith(turn, start):
        return start, start + len(turn)
    # Qwen3 keeps thinking in the last turn only, so an earlier turn stands there without its head.
    words = messages[i].content.split()[-1:]
    for cut in range(1, len(turn)):
        if full.startswith(turn[cut:], start) and words and words[0] in turn[cut:]:
            return start, start + len(turn) - cut
    return None
