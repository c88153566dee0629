"""Plain documents for pre-training: one column, text."""

from typing import Any

from jaxsft.data.chat import Text
from jaxsft.data.formats.turns import string

COLUMNS = ("text",)


def parse(fields: dict[str, Any]) -> Text:
    """Takes the document.

    Raises:
      DataError: text is no string.

    Example:
      >>> parse({"text": "Once upon a time"})
      Text(text='Once upon a time')
    """
    return Text(string(fields, "text"))
