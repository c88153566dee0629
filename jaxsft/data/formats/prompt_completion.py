"""TRL's prompt and completion, of which the completion is learned: plain text, or messages for the chat template."""

from typing import Any

from jaxsft.data.chat import Completion, Conversation
from jaxsft.data.formats.turns import expect_order, same_kind, string, tools, with_system

COLUMNS = ("prompt", "completion")


def parse(fields: dict[str, Any]) -> Completion | Conversation:
    """Makes plain text of strings, a conversation of messages; answers inside the prompt are not learned.

    Raises:
      DataError: one is a string and the other messages, or the roles are out of order.

    Example:
      >>> parse({"prompt": "The sky is", "completion": " blue."})
      Completion(prompt='The sky is', completion=' blue.')
    """
    prompt, completion = same_kind(fields, "prompt", "completion")
    if isinstance(prompt, str) or isinstance(completion, str):
        return Completion(str(prompt), str(completion))
    asked = tuple(message._replace(learn=False) for message in prompt)
    messages = with_system(asked + completion, string(fields, "system"))
    return Conversation(expect_order(messages, "prompt + completion", strict=False), tools(fields.get("tools")))
