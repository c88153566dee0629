"""Alpaca rows: instruction, input, output, and LLaMA-Factory's optional system and history."""

from typing import Any

from jaxsft.data.chat import Conversation, Message
from jaxsft.data.sources import DataError

COLUMNS = ("instruction", "output")


def parse(fields: dict[str, Any]) -> Conversation:
    """Makes a conversation; the user's turn is instruction and input on lines of their own.

    Raises:
      DataError: a column is no string, there is no question, or history is not [[question, answer], ...].

    Example:
      >>> parse({"instruction": "Add.", "input": "1 2", "output": "3", "history": [["hi", "hello"]]}).messages[2]
      Message(role='user', content='Add.\\n1 2')
    """
    texts = {name: fields.get(name, "") for name in ("system", "instruction", "input", "output")}
    for name, value in texts.items():
        if not isinstance(value, str):
            raise DataError(f"{name} is {value!r}; expected a string")
    question = "\n".join(filter(None, (texts["instruction"], texts["input"])))
    if not question:
        raise DataError('instruction and input are both ""; give one; a plain document is {"text": ...}')
    history = fields.get("history") or []
    if not isinstance(history, list) or not all(map(_pair, history)):
        raise DataError(f"history is {history!r}; expected [[question, answer], ...], all strings")
    turns = [("system", texts["system"])] if texts["system"] else []
    for asked, answered in [*history, (question, texts["output"])]:
        turns += [("user", asked), ("assistant", answered)]
    return Conversation(tuple(Message(*turn) for turn in turns))


def _pair(turn: Any) -> bool:
    return isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn)
