"""ShareGPT rows: conversations of {from, value}, with LLaMA-Factory's optional system, tools, chosen and rejected.

Turns alternate: human or observation, then gpt or function_call, whose value is the JSON of one call or several.
"""

from typing import Any

from jaxsft.data.chat import Conversation, Preference, Unpaired
from jaxsft.data.formats.turns import expect_order, images, judged, show, string, tools, turns, with_system
from jaxsft.data.rows import DataError

COLUMNS = ("conversations",)


def parse(fields: dict[str, Any]) -> Conversation | Preference | Unpaired:
    """Makes a conversation; a preference where chosen and rejected give the last turn, unpaired with a kto_tag.

    Raises:
      DataError: turns that do not alternate, an unknown role, a call that is no JSON.

    Example:
      >>> turns = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]
      >>> row = {"conversations": turns, "system": "Be kind."}
      >>> [f"{message.role}: {message.content}" for message in parse(row).messages]
      ['system: Be kind.', 'user: hi', 'assistant: hello']
    """
    return dialogue(fields, "conversations", strict=True)


def dialogue(fields: dict[str, Any], name: str, *, strict: bool) -> Conversation | Preference | Unpaired:
    """What sharegpt and messages rows have in common; `name` is the column of the turns."""
    messages = with_system(turns(fields[name], name), string(fields, "system"))
    given = tools(fields.get("tools"))
    if "chosen" in fields and "rejected" in fields:
        prompt = expect_order(messages, name, strict=strict, last="")
        if prompt[-1].role == "assistant":
            raise DataError(f"{name} ends with the assistant, and chosen and rejected answer it; remove its last turn")
        chosen, rejected = (_answer(fields[side], side) for side in ("chosen", "rejected"))
        judged(fields, chosen, rejected)
        return Preference(prompt, chosen, rejected, given)
    messages = expect_order(messages, name, strict=strict)
    tag = "kto_tag" if "kto_tag" in fields else "label"
    if (label := fields.get(tag)) is not None:
        if not isinstance(label, bool):
            raise DataError(f"{tag} is {show(label)}; expected true or false")
        judged(fields, messages[-1])
        return Unpaired(messages[:-1], messages[-1:], label, given)
    return Conversation(messages, given, images(fields))


def _answer(found: Any, side: str):
    (message,) = answer = turns([found] if isinstance(found, dict) else found, side)[-1:]
    if message.role != "assistant":
        raise DataError(f"{side} is of the {message.role}; expected a turn of the assistant")
    return answer
