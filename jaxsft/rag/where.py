"""Filters of a search: key=value conditions, written as SQL in which every value is quoted.

source=handbook/*    the document's name; * stands for anything
kind=pdf, page=3     the file's ending, the page
lang!=en             any other key is a tag: front matter, a column of a table
"""

import re
from collections.abc import Sequence

from jaxsft.rag.store import quoted
from jaxsft.run import RunError

TEXTS = ("file", "source", "title", "heading", "kind")
PAGE = "page"
APART = "\x1f"  # ASCII's separator of units, which no tag has


def sql(conditions: Sequence[str]) -> str:
    """Writes conditions, all of which are to hold, as SQL for LanceDB; none as "".

    Raises:
      RunError: a condition is not key=value or key!=value, or a page is no number.

    Example:
      >>> sql(["kind=pdf", "page!=3", "owner=Wren's"])
      "(kind = 'pdf') AND (NOT coalesce(page = 3, false)) AND (coalesce(array_has(tags, 'owner=Wren''s'), false))"
    """
    return " AND ".join(f"({_one(condition)})" for condition in conditions)


def _one(condition: str) -> str:
    found = re.fullmatch(r"\s*([^=!\s][^=!]*?)\s*(!?=)\s*(.*?)\s*", condition, re.DOTALL)
    if not found:
        raise RunError(f"a filter is key=value or key!=value, not {condition!r}; try source=handbook/*")
    key, sign, value = found.groups()
    if key == PAGE and not (value.isascii() and value.isdigit()):
        raise RunError(f"page={value} is no page's number; give a whole one, as in page=3")
    if key == PAGE:
        holds = f"{PAGE} = {int(value)}"
    elif key in TEXTS and "*" in value:
        holds = f"regexp_like({key}, {quoted('(?s)^' + _pattern(value, '.') + '$')})"
    elif key in TEXTS:
        holds = f"{key} = {quoted(value)}"
    elif "*" in value:
        inside = f"(^|{APART}){_pattern(f'{key}={value}', f'[^{APART}]')}({APART}|$)"
        holds = f"regexp_like(array_to_string(tags, {quoted(APART)}), {quoted(inside)})"
    else:
        holds = f"coalesce(array_has(tags, {quoted(f'{key}={value}')}), false)"
    return holds if sign == "=" else f"NOT coalesce({holds}, false)"


def _pattern(glob: str, anything: str) -> str:
    """A regular expression for a text with *; everything else stands for itself."""
    parts = (re.sub(r"([\\.+?()|\[\]{}^$#&~-])", r"\\\1", part) for part in glob.split("*"))
    return f"{anything}*".join(parts)
