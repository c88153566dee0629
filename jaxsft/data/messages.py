"""OpenAI rows: messages, each with a role and a content."""

from typing import Any

from jaxsft.data.chat import Conversation, Message
from jaxsft.data.sources import DataError

COLUMNS = ("messages",)
ROLES = ("system", "user", "assistant")


def parse(fields: dict[str, Any]) -> Conversation:
    """Makes a conversation; a system message may come first, then a user's, and the assistant has the last word.

    Raises:
      DataError: messages is no list of {role, content} in that order; tools are not supported.

    Example:
      >>> turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
      >>> parse({"messages": turns}).messages[1]
      Message(role='assistant', content='hello')
    """
    found = fields["messages"]
    if not isinstance(found, list) or not found:
        raise DataError(f"messages is {found!r}; expected a list of {{role, content}}")
    for number, message in enumerate(found, 1):
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise DataError(f"message {number} is {message!r}; expected a role of {', '.join(ROLES)}, and a content")
        if not isinstance(message.get("content"), str):
            raise DataError(f"message {number} has content {message.get('content')!r}; expected a string")
    roles = [message["role"] for message in found]
    spoken = roles[1:] if roles[0] == "system" else roles
    if "system" in spoken or spoken[:1] != ["user"] or spoken[-1] != "assistant":
        raise DataError(f"roles are {', '.join(roles)}; expected system (optional), user, ..., assistant")
    return Conversation(tuple(Message(message["role"], message["content"]) for message in found))
