"""TRL's prompts alone, for models to answer; a row's other columns stay with it for the reward function."""

from typing import Any

from jaxsft.data.chat import Prompt
from jaxsft.data.formats.turns import either, expect_order, tools

COLUMNS = ("prompt",)


def parse(fields: dict[str, Any]) -> Prompt:
    """Makes a prompt of a string, or of messages that end with the user or a tool.

    Raises:
      DataError: prompt is neither, or the assistant speaks last.

    Example:
      >>> parse({"prompt": "1 + 1 =", "answer": "2"})
      Prompt(prompt='1 + 1 =', tools=(), fields={'answer': '2'})
    """
    prompt = either(fields, "prompt")
    if not isinstance(prompt, str):
        last = prompt[-1].role
        expect_order(prompt, "prompt", strict=False, last=last if last == "tool" else "user")
    rest = {name: value for name, value in fields.items() if name not in ("prompt", "tools")}
    return Prompt(prompt, tools(fields.get("tools")), rest)
