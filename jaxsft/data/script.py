"""From a record to text: what a chat template writes, and which characters of it are learned.

A turn of the assistant begins where its generation prompt ends, and ends with what the template writes behind it. What
people wrote stays text: what reads like a special token in a message is marked, so that it is spelled, not obeyed.
"""

import json
import re
from typing import Any, Literal, NamedTuple

from jaxsft.data.chat import (
    Completion,
    Conversation,
    Message,
    Parsed,
    Passage,
    Preference,
    Prompt,
    Text,
    ToolCall,
    Tools,
    Turns,
    Unpaired,
    as_dicts,
)
from jaxsft.data.formats.turns import with_system
from jaxsft.data.rows import DataError
from jaxsft.data.vocabulary import vocabulary

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class How(NamedTuple):
    """What is written and learned, whatever the row."""

    system: str = ""  # opens conversations that have no system message
    learn: Literal["answers", "last", "all"] = "answers"
    reasoning: Literal["learn", "mask"] = "learn"
    control: bool = False  # special tokens written in the data are control tokens


AS_USUAL = How()


class Script(NamedTuple):
    """A text before it is tokenised."""

    text: str
    answers: tuple[tuple[int, int], ...] = ()  # characters: first, last + 1, with the stop token and what follows it
    learn: tuple[bool, ...] = ()  # of each answer
    opening: int | None = None  # a token to begin with
    mark: str = ""  # a character that stands in what must not be read as a special token


def scripts(parsed: Parsed, tokenizer: Any, how: How = AS_USUAL) -> list[Script]:
    """Writes a record out: one text, or two of a preference, the chosen one first.

    Raises:
      DataError: see `render`; there is no text in an image.

    Example:
      >>> from jaxsft.data.vocabulary import doctest_tokenizer
      >>> scripts(Completion("The sky is", " blue."), doctest_tokenizer())[0].answers
      ((10, 20),)
    """
    match parsed:
        case Conversation(messages, tools, images):
            if images:
                raise DataError(
                    f"the row has {len(images)} images, which no language model here can see; remove the row"
                )
            return [_conversation(messages, tools, tokenizer, how)]
        case Completion(prompt, completion):
            return [_plain(prompt, completion, tokenizer, how)]
        case Text(text):
            script = _plain("", text, tokenizer, how)
            start = script.opening if script.opening is not None else tokenizer.eos_token_id
            return [script._replace(opening=start)]
        case Passage(text):
            return [_passage(text, tokenizer, how)]
        case Prompt(prompt, tools):
            if isinstance(prompt, str):
                script = _plain(prompt, "", tokenizer, how)
                return [script._replace(text=script.text[: script.answers[0][0]], answers=())]
            (messages, tools), mark = _mark(with_system(prompt, how.system), tools, tokenizer, how)
            return [_prompt(messages, tools, tokenizer)._replace(mark=mark)]
        case Unpaired(prompt, completion, _, tools):
            return [_answer(prompt, completion, tools, tokenizer, how)]
        case Preference(prompt, chosen, rejected, tools):
            return [_answer(prompt, side, tools, tokenizer, how) for side in (chosen, rejected)]
    raise DataError(f"{type(parsed).__name__.lower()} rows hold no text; they are for scripts/classify.py")


def _prompt(messages: Turns, tools: Tools, tokenizer: Any) -> Script:
    """Turns up to where an answer begins; earlier answers are told, to be tokenised as they were learned."""
    text = write(messages, tools, tokenizer, add_generation_prompt=True)
    turns = [i for i, message in enumerate(messages) if message.role == "assistant"]
    try:
        spans = _spans(messages, tools, turns, text, tokenizer)
    except DataError:  # not told turn by turn; nothing is learned here that would need it
        spans = []
    return Script(text, tuple(spans), (False,) * len(spans))


def _answer(prompt: str | Turns, answer: str | Turns, tools: Tools, tokenizer: Any, how: How) -> Script:
    """A prompt and one answer to it, of which the answer is learned."""
    if isinstance(prompt, str) or isinstance(answer, str):
        return _plain(str(prompt), str(answer), tokenizer, how)
    asked = tuple(message._replace(learn=False) for message in prompt)
    return _conversation(asked + answer, tools, tokenizer, how)


def _plain(prompt: str, completion: str, tokenizer: Any, how: How) -> Script:
    """Text as it is, between the BOS that the tokenizer writes by itself, if it does, and an EOS."""
    if tokenizer.eos_token_id is None:
        raise DataError("the tokenizer has no eos_token to end a text with; name one in tokenizer_config.json")
    known = vocabulary(tokenizer)
    mark = "" if how.control else known.mark_for(prompt + completion)
    prompt, completion = (known.guard(part, mark) for part in (prompt, completion))
    text = prompt + completion + tokenizer.eos_token
    return Script(text, ((len(prompt), len(text)),), (True,), known.bos, mark)


def _passage(text: str, tokenizer: Any, how: How) -> Script:
    """Text between the tokens that an encoder begins and ends every text with: [CLS] and [SEP], <s> and </s>."""
    opening, closing = tokenizer.cls_token or tokenizer.bos_token, tokenizer.sep_token or tokenizer.eos_token
    if opening is None or closing is None:
        raise DataError(
            "an encoder's text begins with cls_token and ends with sep_token, and the tokenizer does not name both; "
            "name them in tokenizer_config.json"
        )
    known = vocabulary(tokenizer)
    mark = "" if how.control else known.mark_for(text)
    text = known.guard(text, mark) + closing
    return Script(text, ((0, len(text)),), (True,), tokenizer.convert_tokens_to_ids(opening), mark)


def _conversation(messages: Turns, tools: Tools, tokenizer: Any, how: How) -> Script:
    (messages, tools), mark = _mark(with_system(messages, how.system), tools, tokenizer, how)
    full = write(messages, tools, tokenizer)
    turns = [i for i, message in enumerate(messages) if message.role == "assistant"]
    spans = _spans(messages, tools, turns, full, tokenizer)
    return Script(full, tuple(spans), tuple(messages[i].learn for i in turns), mark=mark)


def _mark(messages: Turns, tools: Tools, tokenizer: Any, how: How) -> tuple[tuple[Turns, Tools], str]:
    """Puts a mark into everything that reads like a special token, so that it is known behind the template."""
    known = vocabulary(tokenizer)
    said = [part for message in messages for part in (message.content, message.reasoning)]
    called = [[message.calls for message in messages if message.calls], tools]
    said += [json.dumps(called, ensure_ascii=False, default=str)] if any(called) else []
    mark = "" if how.control else known.mark_for("\0".join(said))
    if not mark:
        return (messages, tools), ""

    def guard(value: Any) -> Any:
        match value:
            case str():
                return known.guard(value, mark)
            case dict():
                return {guard(key): guard(inner) for key, inner in value.items()}
            case Message(role, content, reasoning, calls, learn):
                return Message(role, guard(content), guard(reasoning), guard(calls), learn)
            case ToolCall(name, arguments):
                return ToolCall(guard(name), guard(arguments))
            case list() | tuple():
                return type(value)(guard(inner) for inner in value)
        return value

    return (guard(messages), guard(tools)), mark


def write(messages: Turns, tools: Tools, tokenizer: Any, **options: Any) -> str:
    """What the chat template makes of turns.

    Raises:
      DataError: it refuses them, or leaves out the words of one.
    """
    template = tokenizer.get_chat_template()
    messages = _keep_reasoning(messages, template)
    try:
        text = _render_template(as_dicts(messages), tools, template, tokenizer, options)
    except DataError as error:
        if not (isinstance(error.__cause__, TypeError) and any(message.calls for message in messages)):
            raise
        # DeepSeek's templates add the arguments of a call to a string
        text = _render_template(as_dicts(messages, json_arguments=True), tools, template, tokenizer, options)
    for number, message in enumerate(messages, 1):
        words = message.content.rpartition("</think>")[2].strip()
        lost = message.role != "tool" and words not in text
        if lost or any(call.name not in text for call in message.calls):
            what = "content" if lost else "calls"
            raise DataError(
                f"the chat template leaves out the {what} of message {number} ({message.role}); "
                "choose another with data.template, such as chatml"
            )
    if any(tool["function"]["name"] not in text for tool in tools):
        raise DataError("the chat template leaves out the tools; choose another with data.template, such as chatml")
    return text


def _render_template(turns: list[dict], tools: Tools, template: str, tokenizer: Any, options: dict) -> Any:
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    given = {"chat_template": template, "tools": list(tools) or None, **vocabulary(tokenizer).named, **options}
    try:
        texts, spans = render_jinja_template([turns], **given)
    except (TemplateError, ValueError, AttributeError, TypeError, LookupError) as error:
        roles = ", ".join(turn["role"] for turn in turns)
        raise DataError(f"the chat template refuses turns {roles} ({error}); change the row or the template") from error
    return spans[0] if "return_assistant_tokens_mask" in options else texts[0]


def _keep_reasoning(messages: Turns, template: str) -> Turns:
    """Puts reasoning into the content where the template would leave it out."""
    if "reasoning_content" in template:
        return messages
    fold = lambda m: m._replace(content=f"<think>\n{m.reasoning}\n</think>\n\n{m.content}", reasoning="")
    return tuple(fold(message) if message.reasoning else message for message in messages)


def _spans(messages: Turns, tools: Tools, turns: list[int], full: str, tokenizer: Any) -> list[tuple[int, int]]:
    """First and last + 1 character of each turn of the assistant, stop token and what follows it included."""
    template = tokenizer.get_chat_template()
    if GENERATION.search(template):
        options = {"return_assistant_tokens_mask": True}
        written = as_dicts(_keep_reasoning(messages, template))
        spans = _render_template(written, tools, template, tokenizer, options)
        if len(spans) == len(turns):
            known = vocabulary(tokenizer)
            return [(first, known.with_stop(full, first, last)) for first, last in spans]
    found = [_span(messages, tools, i, full, tokenizer) for i in turns]
    if None in found:
        raise DataError(
            f"the chat template does not write message {turns[found.index(None)] + 1} as an addition to those before "
            "it, so what is learned cannot be told; mark the assistant's words in it with {% generation %}"
        )
    return found  # type: ignore[return-value]


def _span(messages: Turns, tools: Tools, i: int, full: str, tokenizer: Any) -> tuple[int, int] | None:
    upto = full if i + 1 == len(messages) else write(messages[: i + 1], tools, tokenizer)
    prompt = write(messages[:i], tools, tokenizer, add_generation_prompt=True)
    if not (full.startswith(prompt) and upto.startswith(prompt)):
        prompt = _probe(messages, tools, i, tokenizer)
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


def _probe(messages: Turns, tools: Tools, i: int, tokenizer: Any) -> str:
    """What the template writes before the words of a turn, whatever they are: its generation prompt is another one.

    Some templates open or close the reasoning there, depending on a setting; this turn has it one way or the other.
    """
    other = lambda word: messages[i]._replace(content=word, reasoning=word if messages[i].reasoning else "", calls=())
    one, two = (write((*messages[:i], other(word)), tools, tokenizer) for word in ("x", "y"))
    return one[: next((n for n, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), 0)]
