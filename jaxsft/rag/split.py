"""Cuts documents into passages: by their headings and pages first, then by what a text is made of, down to its words.

A passage never goes on from one section into another, so its heading and page are true of all of it. One exception: a
section that is nothing but a heading goes with the first section under it, since alone it answers no question.
Within a section the largest units that fit are taken (paragraphs, then sentences, then words; in Markdown its lists,
tables and code, too), by semantic-text-splitter. Passages of one section may overlap.

Left out: small sections are not put together, however small they are, and meaning is not asked where to cut.
"""

import re
from collections.abc import Callable, Iterator
from itertools import chain, pairwise

from jaxsft.rag.extra import need
from jaxsft.rag.records import Document, Passage, Section
from jaxsft.run import RunError

MARKDOWN = (".md", ".markdown")
# The splitter's time grows with the square of a stretch that nothing parts (base64, Chinese without punctuation).
LONG = 2000
PIECE = 500_000  # characters that the splitter is given at one time: it keeps some hundred bytes for each of them
RUN = re.compile(rf"[^\s.,;:!?。，；：！？]{{1,{LONG}}}")


def split(document: Document, length: Callable[[str], int], *, size: int, overlap: int = 0) -> list[Passage]:
    """Cuts a document into passages of at most `size` tokens.

    Each is document.text[start:end], without white space at its ends, and every other character of every section is in
    one. A word that is longer than a passage is cut; a single character is not, however many tokens it has.

    Args:
      document: from a reader.
      length: counts the tokens of a text; it is called some ten thousand times for a megabyte.
      size: tokens of a passage at most.
      overlap: tokens at most that a passage begins with of the one before it.

    Raises:
      RunError: size is no positive number, or overlap none below it.

    Example:
      >>> text = "The lamp is red. It is lit at dusk. " * 2
      >>> document = Document("a.txt", "a", text, (Section(0, len(text)),))
      >>> for passage in split(document, lambda text: len(text.split()), size=12):
      ...     print(passage.start, passage.end, passage.text)
      0 35 The lamp is red. It is lit at dusk.
      36 71 The lamp is red. It is lit at dusk.
    """
    if size < 1 or not 0 <= overlap < size:
        raise RunError(
            f"passages of {size} tokens with an overlap of {overlap}; give a size of at least 1, and less overlap"
        )
    splitters = need("semantic_text_splitter")
    kind = splitters.MarkdownSplitter if document.source.lower().endswith(MARKDOWN) else splitters.TextSplitter
    cut = kind.from_callback(length, size, overlap).chunk_indices
    passages = []
    for section in joined(document):
        for begin, end in _parts(document.text, section):
            found = (_fitting(begin + at, text, length, size) for at, text in cut(document.text[begin:end]))
            for at, piece in chain.from_iterable(found):
                place = {"start": at, "end": at + len(piece), "page": section.page, "tags": document.tags}
                passages.append(Passage(piece, document.source, document.title, section.heading, **place))
    return passages


def joined(document: Document) -> Iterator[Section]:
    """The sections of a document; one that is nothing but a heading goes with the first one under it.

    Example:
      >>> text = "# Manual\\n\\n## Lamps\\nRed."
      >>> sections = (Section(0, 10, "Manual"), Section(10, 23, "Manual > Lamps"))
      >>> list(joined(Document("a.md", "Manual", text, sections)))
      [Section(start=0, end=23, heading='Manual > Lamps', page=None)]
    """
    waiting: Section | None = None
    for section in document.sections:
        if waiting is not None:
            if section.page == waiting.page and section.heading.startswith(waiting.heading):
                section = section._replace(start=waiting.start)
            else:
                yield waiting
        waiting = section if _is_heading(document.text[section.start : section.end], section.heading) else None
        if waiting is None:
            yield section
    if waiting is not None:
        yield waiting


def _is_heading(text: str, heading: str) -> bool:
    words = " ".join(text.strip(" \t\r\n#=-").split())
    return bool(words) and heading.endswith(words)


def _parts(text: str, section: Section) -> Iterator[tuple[int, int]]:
    """A section, or its parts before, in and behind stretches that are too long for the splitter; none is very long."""
    runs = (found.span() for found in RUN.finditer(text, section.start, section.end))
    cuts = {place for start, end in runs if end - start == LONG for place in (start, end)}
    return pairwise(sorted(cuts | set(_paragraphs(text, section)) | {section.start, section.end}))


def _paragraphs(text: str, section: Section) -> Iterator[int]:
    """Where a long section is cut before all else: behind a paragraph, or else a line, once in so many characters."""
    at = section.start
    while section.end - at > PIECE:
        ends = (text.rfind(mark, at + PIECE // 2, at + PIECE) + len(mark) for mark in ("\n\n", "\n", " "))
        at = next((end for end in ends if end > at + PIECE // 2), at + PIECE)
        yield at


def _fitting(start: int, text: str, length: Callable[[str], int], size: int) -> Iterator[tuple[int, str]]:
    """Halves a piece until it fits: tokenizers that count fewer tokens for a text than for its part lead the splitter
    astray."""
    if length(text) <= size or len(text) < 2:
        if text.strip():
            yield start + len(text) - len(text.lstrip()), text.strip()
        return
    middle = len(text) // 2
    yield from _fitting(start, text[:middle], length, size)
    yield from _fitting(start + middle, text[middle:], length, size)
