"""What the formats of conversations share: turns from lists of objects, tools, calls of functions."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jaxsft.data.chat import Message, ToolCall, Tools, Turns
from jaxsft.data.rows import DataError

# The names of roles that people write, and ours. A function_call is a turn of the assistant that holds only calls.
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "function_call": "function_call",
    "tool": "tool",
    "observation": "tool",
    "ipython": "tool",
}
THOUGHT = re.compile(r"\s*<think>\n?(.*?)\n?</think>\s*", re.DOTALL)


def show(value: Any, most: int = 60) -> str:
    """A value for an error message, cut where it is long.

    Example:
      >>> show("a" * 99, 8)
      "'aaaa..."
    """
    text = repr(value)
    return text if len(text) <= most else text[: most - 3] + "..."


def string(fields: Mapping[str, Any], name: str) -> str:
    """A column that must be a string; "" where it is absent.

    Raises:
      DataError: it is something else.
    """
    value = fields.get(name, "")
    if not isinstance(value, str):
        raise DataError(f"{name} is {show(value)}; expected a string")
    return value


def turns(found: Any, name: str) -> Turns:
    """Reads a list of {"role", "content"} or {"from", "value"}.

    Args:
      found: the column's value.
      name: of the column, for errors.

    Raises:
      DataError: it is no list of such objects, or a role is unknown.

    Example:
      >>> turns([{"from": "human", "value": "hi"}, {"role": "assistant", "content": "hello", "weight": 0}], "messages")
      (Message(role='user', content='hi', ...), Message(role='assistant', content='hello', ... learn=False))
    """
    if not isinstance(found, list) or not found:
        raise DataError(f"{name} is {show(found)}; expected a list of {{role, content}}")
    return tuple(_turn(message, f"message {number} of {name}") for number, message in enumerate(found, 1))


def _turn(found: Any, place: str) -> Message:
    if not isinstance(found, dict):
        raise DataError(f"{place} is {show(found)}; expected an object with role and content")
    name = found.get("role", found.get("from"))
    if not isinstance(name, str) or name not in ROLES:
        raise DataError(f"{place} has role {show(name)}; expected one of {', '.join(ROLES)}")
    role = ROLES[name]
    content, reasoning, calls = _parts(found.get("content", found.get("value")), place)
    reasoning = reasoning or found.get("reasoning_content") or found.get("reasoning") or found.get("thinking") or ""
    if not isinstance(reasoning, str):
        raise DataError(f"{place} has reasoning {show(reasoning)}; expected a string")
    if role == "function_call":
        thought = THOUGHT.match(content)
        reasoning, content = (thought[1], content[thought.end() :]) if thought else (reasoning, content)
        return Message("assistant", "", reasoning, read_calls(content, place), _learn(found, place))
    calls += read_calls(found.get("tool_calls") or [], place)
    if role != "assistant" and (calls or reasoning):
        raise DataError(f"{place} is of the {role} and has {'calls' if calls else 'reasoning'}; only assistants do")
    if found.get("content", found.get("value")) is None and not calls:
        raise DataError(f"{place} has no content; expected a string")
    return Message(role, content, reasoning, calls, _learn(found, place))


def _learn(found: Mapping[str, Any], place: str) -> bool:
    """OpenAI's weight (0 or 1), or train: true or false."""
    for name in ("weight", "train"):
        value = found.get(name)
        if value is not None:
            if value not in (0, 1):
                raise DataError(f"{place} has {name} {show(value)}; expected 0 or 1, false or true")
            return bool(value)
    return True


def _parts(content: Any, place: str) -> tuple[str, str, tuple[ToolCall, ...]]:
    """Content that is a string, or a list of typed parts: text, reasoning, tool_call."""
    if content is None:
        return "", "", ()
    if isinstance(content, str):
        return content, "", ()
    if not isinstance(content, list):
        raise DataError(f"{place} has content {show(content)}; expected a string")
    text, reasoning, calls = [], [], []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        value = part.get("value", part.get(kind)) if isinstance(part, dict) and isinstance(kind, str) else None
        if kind == "text" and isinstance(value, str):
            text.append(value)
        elif kind == "reasoning" and isinstance(value, str):
            reasoning.append(value)
        elif kind == "tool_call":
            calls += read_calls(value, place)
        else:
            raise DataError(f"{place} has the part {show(part)}; expected a text, a reasoning or a tool_call")
    return "".join(text), "".join(reasoning), tuple(calls)


def read_calls(found: Any, place: str) -> tuple[ToolCall, ...]:
    """Reads one call or a list of them: objects with name and arguments, alone or under "function", or their JSON.

    Raises:
      DataError: there is none, or it has no name or its arguments are no object.

    Example:
      >>> read_calls('{"name": "add", "arguments": "{\\\\"a\\\\": 1}"}', "message 2")
      (ToolCall(name='add', arguments={'a': 1}),)
    """
    if isinstance(found, str):
        found = _json(found, f"{place} is no JSON of a function call")
    calls = []
    for call in found if isinstance(found, list) else [found]:
        inner = call.get("function", call) if isinstance(call, dict) else None
        name = inner.get("name") if isinstance(inner, dict) else None
        if not isinstance(inner, dict) or not isinstance(name, str) or not name:
            raise DataError(f'{place} calls {show(call)}; expected {{"name": ..., "arguments": {{...}}}}')
        arguments = inner.get("arguments") or {}
        if isinstance(arguments, str):
            arguments = _json(arguments, f"{place} calls {name} with arguments that are no JSON")
        if not isinstance(arguments, dict):
            raise DataError(f"{place} calls {name} with {show(arguments)}; expected an object of arguments")
        calls.append(ToolCall(name, arguments))
    return tuple(calls)


def tools(found: Any) -> Tools:
    """Reads a column of tools: a list of schemas, or its JSON; each alone or under "function".

    Raises:
      DataError: it is no list, or a tool has no name.

    Example:
      >>> tools('[{"name": "add"}]')
      ({'type': 'function', 'function': {'name': 'add'}},)
    """
    if isinstance(found, str):
        found = _json(found, "tools is no JSON") if found.strip() else []
    if found is None:
        return ()
    wrapped = []
    for tool in found if isinstance(found, list) else [found]:
        inner = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
            raise DataError(f'tools has {show(tool)}; expected {{"name": ..., "parameters": ...}} or OpenAI\'s form')
        wrapped.append(tool if "function" in tool else {"type": "function", "function": tool})
    return tuple(wrapped)


def _json(text: str, problem: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise DataError(f"{problem} ({error}): {show(text)}") from error


def images(fields: Mapping[str, Any]) -> tuple[str, ...]:
    """The column images: paths, none where it is absent.

    Raises:
      DataError: it is something else.

    Example:
      >>> images({"images": "a.png"})
      ('a.png',)
    """
    found = fields.get("images") or ()
    found = [found] if isinstance(found, str) else found
    if not isinstance(found, list | tuple) or not all(isinstance(path, str) for path in found):
        raise DataError(f"images is {show(found)}; expected a list of paths")
    return tuple(found)


def judged(fields: Mapping[str, Any], chosen: Any, rejected: Any = None) -> None:
    """Checks a preference or a judged answer: two answers that differ, and no images, which would be lost.

    Raises:
      DataError: it is not so.
    """
    if seen := images(fields):
        raise DataError(f"the row has {len(seen)} images, which no language model here can see; remove the row")
    if chosen == rejected:
        raise DataError("chosen and rejected are the same; nothing is to be learned from the row, remove it")


def expect_order(messages: Turns, name: str, *, strict: bool, last: str = "assistant") -> Turns:
    """Checks the order of roles: system (optional), then the user, and `last` has the last word.

    Args:
      messages: the turns.
      name: of the column, for errors.
      strict: user or tool, and assistant, take turns.
      last: who speaks last; "" for anybody.

    Returns:
      the messages.

    Raises:
      DataError: they come in another order.

    Example:
      >>> expect_order((Message("user", "a"),), "messages", strict=True)
      Traceback (most recent call last):
        ...
      jaxsft.data.rows.DataError: messages has roles user; expected system (optional), user, ..., assistant
    """
    roles = [message.role for message in messages]
    spoken = roles[1:] if roles[:1] == ["system"] else roles
    taking_turns = all((role == "assistant") == bool(i % 2) for i, role in enumerate(spoken))
    wrong = "system" in spoken or spoken[:1] not in (["user"], ["tool"]) or (bool(last) and spoken[-1] != last)
    if wrong or (strict and not taking_turns):
        turn = ", in turns" if strict and not wrong else ""
        expected = f"system (optional), user, ...{', ' if last else ''}{last}{turn}"
        raise DataError(f"{name} has roles {', '.join(roles) or 'none'}; expected {expected}")
    return messages


def with_system(messages: Turns, system: str) -> Turns:
    """Puts a system message first where there is none yet."""
    return (Message("system", system), *messages) if system and messages[0].role != "system" else messages


def either(fields: Mapping[str, Any], name: str) -> str | Turns:
    """A column that is a string or a list of messages."""
    value = fields[name]
    return value if isinstance(value, str) else turns(value, name)


def same_kind(fields: Mapping[str, Any], *names: str) -> Sequence[str | Turns]:
    """Columns that are all strings or all lists of messages.

    Raises:
      DataError: some are one and some the other.
    """
    found = [either(fields, name) for name in names]
    if len({isinstance(value, str) for value in found}) > 1:
        kinds = ", ".join(
            f"{n} {'text' if isinstance(v, str) else 'messages'}" for n, v in zip(names, found, strict=True)
        )
        raise DataError(f"columns mix text and messages: {kinds}; write all of them one way")
    return found
