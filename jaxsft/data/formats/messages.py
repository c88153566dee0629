"""OpenAI rows: messages of {role, content}, with optional tools, tool_calls, reasoning and weights.

A boolean label beside them makes the last answer an unpaired one.
"""

from typing import Any

from jaxsft.data.chat import Conversation, Preference, Unpaired
from jaxsft.data.formats.sharegpt import dialogue

COLUMNS = ("messages",)


def parse(fields: dict[str, Any]) -> Conversation | Preference | Unpaired:
    """Makes a conversation; a system message may come first, then a user's, and the assistant has the last word.

    Raises:
      DataError: messages is no list of {role, content} in that order.

    Example:
      >>> found = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello", "weight": 0}]
      >>> [message.learn for message in parse({"messages": found}).messages]
      [True, False]
    """
    return dialogue(fields, "messages", strict=False)
