"""A row of a table, or an object of JSON, as a document: `name: value` lines; short values are tags, too."""

from collections.abc import Iterator, Mapping
from typing import Any

from jaxsft.rag.readers import outline
from jaxsft.rag.records import Document, Section

SHORT = 64  # characters of a value that a search may filter by
TITLES = ("title", "name")


def document(fields: Mapping[str, Any], source: str, title: str) -> Document | None:
    """Makes a document of named values; None if all are empty. A lone value is the text itself, without its name.

    Args:
      fields: of the row; of JSON they may be nested.
      source: of the document.
      title: where no column is named title or name.

    Example:
      >>> found = document({"name": "Fresnel", "lamp": {"colour": "red", "watts": 60}}, "lamps.csv#1", "lamps")
      >>> found.text
      'name: Fresnel\\nlamp.colour: red\\nlamp.watts: 60'
      >>> found.title, found.tags["lamp.colour"]
      ('Fresnel', 'red')
    """
    values = {name: value for name, value in flat(fields) if value.strip()}
    if not values:
        return None
    lines = [f"{name}: {value}" if name else value for name, value in values.items()]
    text = next(iter(values.values())) if len(values) == 1 else "\n".join(lines)
    tags = {name: value for name, value in values.items() if name and len(value) <= SHORT and "\n" not in value}
    own = next((tags[name] for wanted in TITLES for name in tags if name.lower() == wanted), title)
    return Document(source, own, text, (Section(0, len(text)),), tags)


def flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """The values of nested objects with their dotted names; a list is one value if nothing in it has names.

    Example:
      >>> list(flat({"a": {"b": 1, "c": ["x", "y"]}, "d": [{"e": True}], "f": None}))
      [('a.b', '1'), ('a.c', 'x, y'), ('d.1.e', 'true'), ('f', '')]
    """
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from flat(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list) and any(isinstance(inner, (Mapping, list)) for inner in value):
        for number, inner in enumerate(value, 1):
            yield from flat(inner, f"{name}.{number}")
    elif isinstance(value, list):
        yield name, ", ".join(map(_word, value))
    else:
        yield name, _word(value)


def _word(value: Any) -> str:
    if value is None:
        return ""
    return (
        outline.whole(value) if isinstance(value, str) else str(value).lower() if value in (True, False) else str(value)
    )
