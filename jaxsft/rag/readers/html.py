"""HTML: what a reader sees, a section for each heading; scripts, styles and navigation left out."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxsft.rag.extra import need
from jaxsft.rag.readers import file, outline
from jaxsft.rag.readers.outline import Block
from jaxsft.rag.records import Document

UNSEEN = ["script", "style", "nav", "noscript", "template", "head", "svg", "iframe", "object", "select", "button"]
HEADINGS = {f"h{level}": level for level in range(1, 7)}
CELLS = {"td", "th"}
# What begins on a line of its own; the text between two of them is one block.
BLOCKS = {*HEADINGS, *CELLS, *"address article aside blockquote body caption dd details dialog div dl dt".split()}
BLOCKS |= set(
    "fieldset figcaption figure footer form header hr html li main ol p pre section summary table tr ul".split()
)


def read(path: Path, source: str, max_bytes: int) -> Iterator[Document]:
    soup = need("bs4").BeautifulSoup(_text(path), "html.parser")
    title = " ".join(soup.title.get_text().split()) if soup.title else ""
    for tag in soup(UNSEEN):
        tag.decompose()
    blocks = list(_blocks(soup))
    if blocks:
        title = title or next((block.text for block in blocks if block.level), path.stem)
        yield outline.document(source, title, blocks)


def _text(path: Path) -> str:
    """The page's text, in the encoding that it declares if it is in that."""
    data = path.read_bytes()
    declared = need("bs4.dammit").EncodingDetector.find_declared_encoding(
        data, is_html=True, search_entire_document=False
    )
    if declared and not data.startswith(tuple(file.MARKS)):
        try:
            return file.check(path, data.decode(declared))
        except (UnicodeDecodeError, LookupError):
            pass  # a page that says what it is not is as common as one that says nothing
    return file.text(path)


def _blocks(soup: Any) -> Iterator[Block]:
    """The text between two borders of blocks; cells of one row of a table make one block."""
    bs4 = need("bs4")
    last, row, words = None, None, ""
    for node in soup.descendants:
        if not isinstance(node, bs4.NavigableString):
            words += "\n" if node.name == "br" else ""
            continue
        if isinstance(node, bs4.element.PreformattedString):  # a comment, a doctype
            continue
        block = next((parent for parent in node.parents if parent.name in BLOCKS), soup)
        if block is not last and str(node).strip():
            line = block.find_parent("tr") if block.name in CELLS else None
            if line is not None and line is row:
                words = words.rstrip() + " | "
            else:
                yield from _block(words, last)
                words = ""
            last, row = block, line
        if block is last:
            words += str(node) if block.name == "pre" else re.sub(r"[ \t\r\n\f]+", " ", str(node))
    yield from _block(words, last)


def _block(words: str, tag: Any) -> Iterator[Block]:
    name = tag.name if tag is not None else ""
    lines = words.strip("\n") if name == "pre" else _tidy(words)
    if lines.strip():
        yield Block(lines, HEADINGS.get(name, 0))


def _tidy(words: str) -> str:
    return "\n".join(" ".join(line.split(" ")).strip() for line in words.split("\n")).strip()
