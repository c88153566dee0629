"""The formats of rows: a new one is one small file and one line here."""

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxsft.data import alpaca, messages, text
from jaxsft.data.chat import Conversation, Text
from jaxsft.data.sources import DataError


class Format(NamedTuple):
    """How rows of one kind are read."""

    columns: tuple[str, ...]  # without which it is another kind
    parse: Callable[[dict[str, Any]], Conversation | Text]


FORMATS = {
    "alpaca": Format(alpaca.COLUMNS, alpaca.parse),
    "messages": Format(messages.COLUMNS, messages.parse),
    "text": Format(text.COLUMNS, text.parse),
}


def detect(fields: dict[str, Any]) -> str:
    """Finds the format of a row: the first whose columns it has.

    Raises:
      DataError: it has those of none.

    Example:
      >>> detect({"instruction": "Add 1 and 2.", "output": "3"})
      'alpaca'
    """
    for name, one in FORMATS.items():
        if all(column in fields for column in one.columns):
            return name
    needs = "; ".join(f"{name} needs {' and '.join(one.columns)}" for name, one in FORMATS.items())
    raise DataError(f"columns {', '.join(fields) or '(none)'} fit no format: {needs}. Rename the columns")


def parse(fields: dict[str, Any], format: str = "auto") -> Conversation | Text:
    """Reads a row in the format given, or in the one its columns tell.

    Raises:
      DataError: there is no such format, or the row does not keep to it.

    Example:
      >>> parse({"text": "Once upon a time"})
      Text(text='Once upon a time')
    """
    if format == "auto":
        format = detect(fields)
    if format not in FORMATS:
        raise DataError(f"data.format is {format!r}; there are auto, {', '.join(FORMATS)}")
    columns, read = FORMATS[format]
    if missing := [column for column in columns if column not in fields]:
        found = ", ".join(fields) or "(none)"
        raise DataError(f"{format} rows need {' and '.join(columns)}; {', '.join(missing)} is not among {found}")
    return read(fields)
