"""Headings and pages of a document: how a text made of blocks gets its sections."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from jaxsft.rag.records import Document, Section

ARROW = " > "


class Block(NamedTuple):
    """A paragraph, a heading or a row of a table."""

    text: str
    level: int = 0  # of a heading: 1 is outermost
    page: int | None = None


Stack = tuple[tuple[int, str], ...]  # the headings that a text stands under, with their levels


def under(stack: Stack, level: int, heading: str) -> Stack:
    """The headings that count from a new heading on.

    Example:
      >>> under(((1, "Manual"), (3, "Oil")), 2, "Lamps")
      ((1, 'Manual'), (2, 'Lamps'))
    """
    return (*((known, text) for known, text in stack if known < level), (level, heading))


def way(stack: Stack) -> str:
    """Headings in one line.

    Example:
      >>> way(((1, "Manual"), (2, "Lamps")))
      'Manual > Lamps'
    """
    return ARROW.join(text for _, text in stack if text)


def document(source: str, title: str, blocks: Iterable[Block], tags: Mapping[str, str] | None = None) -> Document:
    """Puts blocks into one text, a blank line between them; each heading and each page begins a section.

    Example:
      >>> found = document("a.html", "A", [Block("Lamps", 1), Block("Two of them."), Block("Oil", 2), Block("Whale.")])
      >>> [(section.heading, found.text[section.start : section.end]) for section in found.sections]
      [('Lamps', 'Lamps\\n\\nTwo of them.\\n\\n'), ('Lamps > Oil', 'Oil\\n\\nWhale.')]
    """
    pieces: list[str] = []
    starts: list[tuple[int, str, int | None]] = []  # where a section begins, its heading and page
    stack: Stack = ()
    at = 0
    for block in blocks:
        piece = whole(block.text)
        if not piece.strip():
            continue
        if pieces:
            pieces.append("\n\n")
            at += 2
        if block.level:
            stack = under(stack, block.level, " ".join(piece.split()))
        if block.level or not starts or block.page != starts[-1][2]:
            starts.append((at, way(stack), block.page))
        pieces.append(piece)
        at += len(piece)
    ends = [start for start, _, _ in starts[1:]] + [at]
    sections = tuple(Section(*start[:1], end, *start[1:]) for start, end in zip(starts, ends, strict=True) if at)
    return Document(source, title, "".join(pieces), sections, tags or {})


def whole(text: str) -> str:
    """Joins halves of surrogate pairs, and replaces a half that stands alone: no tokenizer can read it.

    Example:
      >>> whole("\\ud83d\\ude42 \\ud83d") == "🙂 \\ufffd"
      True
    """
    if text.isascii():
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
