"""Markdown: the text as it stands, a section for each heading; front matter becomes tags.

Headings are what CommonMark calls so (a `#` in a code block is none). Front matter belongs to no section.
"""

import re
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from jaxsft.rag.extra import need
from jaxsft.rag.readers import file, outline
from jaxsft.rag.records import Document, Section

FRONT = re.compile(r"---[ \t]*(?:\r\n|\r|\n)(.*?)(?:\r\n|\r|\n)(?:---|\.\.\.)[ \t]*(?:\r\n|\r|\n|\Z)", re.DOTALL)
BREAK = re.compile(r"\r\n|\r|\n")


def read(path: Path, source: str, max_bytes: int) -> Iterator[Document]:
    text = file.text(path)
    tags, start = front_matter(text)
    sections = tuple(_sections(text, start))
    if sections:
        title = tags.get("title") or next((s.heading for s in sections if s.heading), path.stem)
        yield Document(source, title.split(outline.ARROW)[0], text, sections, tags)


def front_matter(text: str) -> tuple[dict[str, str], int]:
    """The values that stand between `---` at a text's start, and where the text behind them begins.

    Example:
      >>> front_matter("---\\nkeeper: Wren\\nlamps: [red, green]\\n---\\nThe lamps.")
      ({'keeper': 'Wren', 'lamps': 'red, green'}, 41)
      >>> front_matter("---\\nno mapping\\n---\\n")  # two rules, and a line between them
      ({}, 0)
    """
    import yaml

    found = FRONT.match(text)
    if not found:
        return {}, 0
    try:
        values = yaml.safe_load(found[1])
    except (yaml.YAMLError, ValueError):  # ValueError: a date that is none
        return {}, 0
    if not isinstance(values, Mapping):
        return {}, 0
    return {str(name): _words(value) for name, value in values.items() if value is not None}, found.end()


def _words(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _sections(text: str, start: int) -> Iterator[Section]:
    """Cuts a text, from `start` on, before each heading."""
    parser = need("markdown_it").MarkdownIt("commonmark")
    body = text[start:]
    parser.core.ruler.disable(["inline"])  # what stands in a line matters in headings alone
    tokens = parser.parse(body)
    lines = [0, *(found.end() for found in BREAK.finditer(body)), len(body)]
    parser.core.ruler.enable(["inline"])
    begins: list[tuple[int, str]] = [(start, "")]
    stack: outline.Stack = ()
    for opens, inline in pairwise(tokens):
        if opens.type == "heading_open" and opens.level == 0:
            words = "".join(part.content or " " for part in parser.parseInline(inline.content)[0].children or [])
            stack = outline.under(stack, int(opens.tag[1]), " ".join(words.split()))
            begins.append((start + lines[opens.map[0]], outline.way(stack)))
    ends = [at for at, _ in begins[1:]] + [len(text)]
    for (at, heading), end in zip(begins, ends, strict=True):
        if text[at:end].strip():
            yield Section(at, end, heading)
