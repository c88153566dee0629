"""The formats of rows: a new one is one small file and one line here.

Order matters to detection alone: the first whose columns a row has. "a|b" is satisfied by either column.
"""

import os
from collections.abc import Callable
from typing import Any, NamedTuple

from jaxsft.data.chat import Conversation, Image, Parsed
from jaxsft.data.formats import (
    alpaca,
    image,
    messages,
    preference,
    prompt,
    prompt_completion,
    sharegpt,
    text,
    unpaired,
)
from jaxsft.data.rows import DataError


class Format(NamedTuple):
    """How rows of one kind are read."""

    columns: tuple[str, ...]  # without which it is another kind
    parse: Callable[[dict[str, Any]], Parsed]


FORMATS = {
    "alpaca": Format(alpaca.COLUMNS, alpaca.parse),
    "sharegpt": Format(sharegpt.COLUMNS, sharegpt.parse),
    "preference": Format(preference.COLUMNS, preference.parse),
    "unpaired": Format(unpaired.COLUMNS, unpaired.parse),
    "prompt_completion": Format(prompt_completion.COLUMNS, prompt_completion.parse),
    "messages": Format(messages.COLUMNS, messages.parse),
    "image": Format(image.COLUMNS, image.parse),
    "prompt": Format(prompt.COLUMNS, prompt.parse),
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
        if not _missing(fields, one.columns):
            return name
    needs = "; ".join(f"{name} needs {_words(one.columns)}" for name, one in FORMATS.items())
    raise DataError(f"columns {', '.join(fields) or '(none)'} fit no format: {needs}. Rename them with data columns")


def parse(fields: dict[str, Any], format: str = "auto", folder: str = "") -> tuple[str, Parsed]:
    """Reads a row in the format given, or in the one its columns tell.

    Args:
      fields: the row.
      format: a name of `FORMATS`, or "auto".
      folder: of the row's file, which the paths of images start from.

    Returns:
      (the format's name, the record).

    Raises:
      DataError: there is no such format, or the row does not keep to it.

    Example:
      >>> parse({"text": "Once upon a time"})
      ('text', Text(text='Once upon a time'))
    """
    if format == "auto":
        format = detect(fields)
    if format not in FORMATS:
        raise DataError(f"data.format is {format!r}; there are auto, {', '.join(FORMATS)}")
    columns, read = FORMATS[format]
    if missing := _missing(fields, columns):
        found = ", ".join(fields) or "(none)"
        raise DataError(f"{format} rows need {_words(columns)}; {_words(missing)} is not among {found}")
    parsed = read(fields)
    if isinstance(parsed, Image):
        parsed = parsed._replace(path=os.path.join(folder, parsed.path))
    elif isinstance(parsed, Conversation) and parsed.images:
        parsed = parsed._replace(images=tuple(os.path.join(folder, str(path)) for path in parsed.images))
    return format, parsed


def _missing(fields: dict[str, Any], columns: tuple[str, ...]) -> list[str]:
    return [column for column in columns if not any(name in fields for name in column.split("|"))]


def _words(columns: tuple[str, ...] | list[str]) -> str:
    return " and ".join(column.replace("|", " or ") for column in columns)
