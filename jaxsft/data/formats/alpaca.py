"""Alpaca rows: instruction, input, output, and LLaMA-Factory's optional system, history and tools.

With chosen and rejected in output's place a row is a preference, with a boolean kto_tag an unpaired answer.
"""

from typing import Any

from jaxsft.data.chat import Conversation, Message, Preference, Unpaired
from jaxsft.data.formats.turns import images, judged, show, string, tools
from jaxsft.data.rows import DataError

COLUMNS = ("instruction", "output|chosen")


def parse(fields: dict[str, Any]) -> Conversation | Preference | Unpaired:
    """Makes a conversation; the user's turn is instruction and input on lines of their own.

    Raises:
      DataError: a column is no string, there is no question, or history is not [[question, answer], ...].

    Example:
      >>> row = {"instruction": "Add.", "input": "1 2", "output": "3", "history": [["hi", "hello"]]}
      >>> [message.content for message in parse(row).messages]
      ['hi', 'hello', 'Add.\\n1 2', '3']
    """
    question = "\n".join(filter(None, (string(fields, "instruction"), string(fields, "input"))))
    if not question:
        raise DataError('instruction and input are both ""; give one; a plain document is {"text": ...}')
    history = fields.get("history") or []
    if not isinstance(history, list) or not all(map(_pair, history)):
        raise DataError(f"history is {show(history)}; expected [[question, answer], ...], all strings")
    before = [Message("system", string(fields, "system"))] if string(fields, "system") else []
    for asked, answered in history:
        before += [Message("user", asked), Message("assistant", answered)]
    prompt, given = (*before, Message("user", question)), tools(fields.get("tools"))
    say = lambda name: (Message("assistant", string(fields, name)),)
    if "output" not in fields and "rejected" not in fields:
        raise DataError("the row has chosen and no rejected; add it, or name the answer output")
    if "chosen" in fields and "rejected" in fields:
        judged(fields, fields["chosen"], fields["rejected"])
        return Preference(prompt, say("chosen"), say("rejected"), given)
    if (label := fields.get("kto_tag")) is not None:
        if not isinstance(label, bool):
            raise DataError(f"kto_tag is {show(label)}; expected true or false")
        judged(fields, "output")
        return Unpaired(prompt, say("output"), label, given)
    return Conversation(prompt + say("output"), given, images(fields))


def _pair(turn: Any) -> bool:
    return isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn)
