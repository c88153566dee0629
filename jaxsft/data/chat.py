"""What rows become: conversations and their relatives, each a plain record.

    Conversation   turns; those of the assistant are learned
    Completion     a prompt and what follows it, as plain text; what follows is learned
    Text           a document, learned whole
    Passage        a document for an encoder, any token of which may be masked and learned
    Prompt         what a model is asked to answer, with the row's other columns for whoever judges the answer
    Preference     a prompt and two answers, one better than the other
    Unpaired       a prompt and an answer, with a thumb up or down
    Image          a picture and its class

A prompt or an answer is a tuple of messages where a chat template writes it, or a string that is taken as it is.
"""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple


class ToolCall(NamedTuple):
    """A function that the assistant calls, with its arguments in their order."""

    name: str
    arguments: Mapping[str, Any]


class Message(NamedTuple):
    """One turn."""

    role: str  # system, user, assistant or tool
    content: str
    reasoning: str = ""  # what the assistant thought before it spoke
    calls: tuple[ToolCall, ...] = ()
    learn: bool = True  # counts for the assistant's turns alone


Turns = tuple[Message, ...]
Tools = tuple[Mapping[str, Any], ...]  # JSON schemas, {"type": "function", "function": {"name": ..., ...}}


class Conversation(NamedTuple):
    """Turns, of which those of the assistant are learned."""

    messages: Turns
    tools: Tools = ()
    images: tuple[str, ...] = ()  # files


class Completion(NamedTuple):
    """Plain text in two parts, of which the second is learned."""

    prompt: str
    completion: str


class Text(NamedTuple):
    """A plain document, learned whole."""

    text: str


class Passage(NamedTuple):
    """A plain document for an encoder, any token of which may be masked and learned."""

    text: str


class Prompt(NamedTuple):
    """A question for a model to answer."""

    prompt: str | Turns
    tools: Tools = ()
    fields: Mapping[str, Any] = {}


class Preference(NamedTuple):
    """Two answers to one prompt."""

    prompt: str | Turns
    chosen: str | Turns
    rejected: str | Turns
    tools: Tools = ()
    margin: float = 0.0  # how much better chosen is, where the row says so


class Unpaired(NamedTuple):
    """One answer, and whether it is wanted."""

    prompt: str | Turns
    completion: str | Turns
    label: bool
    tools: Tools = ()


class Image(NamedTuple):
    """A picture of a class."""

    path: str
    label: str


Parsed = Conversation | Completion | Text | Passage | Prompt | Preference | Unpaired | Image


def as_dicts(messages: Turns, *, json_arguments: bool = False) -> list[dict[str, Any]]:
    """Messages in the form that chat templates read, that of OpenAI and transformers.

    Args:
      messages: the turns.
      json_arguments: give the arguments of calls as JSON text; a few templates add strings to them.

    Example:
      >>> as_dicts((Message("assistant", "", calls=(ToolCall("add", {"a": 1}),)),))[0]["tool_calls"]
      [{'type': 'function', 'function': {'name': 'add', 'arguments': {'a': 1}}}]
    """
    found = []
    for message in messages:
        turn: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.reasoning:
            turn["reasoning_content"] = message.reasoning
        if message.calls:
            give = (lambda value: json.dumps(value, ensure_ascii=False)) if json_arguments else dict
            functions = [{"name": call.name, "arguments": give(call.arguments)} for call in message.calls]
            turn["tool_calls"] = [{"type": "function", "function": function} for function in functions]
        found.append(turn)
    return found
