"""Word documents: paragraphs and tables in their order, a section for each heading; a row of a table is a line."""

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxsft.rag.extra import need
from jaxsft.rag.readers import outline
from jaxsft.rag.readers.file import ReadError
from jaxsft.rag.readers.outline import Block
from jaxsft.rag.records import Document


def read(path: Path, source: str, max_bytes: int) -> Iterator[Document]:
    docx = need("docx")
    _check(path, max_bytes)
    try:
        found = docx.Document(str(path))
        blocks = list(_blocks(found, docx))
        title = found.core_properties.title
    except Exception as error:  # a broken file breaks the parser in any way
        reason = f"is a broken Word document ({type(error).__name__}: {error})"
        raise ReadError(path, reason, "open it in a word processor and save it again") from None
    if blocks:
        title = title.strip() or next((block.text for block in blocks if block.level), path.stem)
        yield outline.document(source, title, blocks)


def _check(path: Path, max_bytes: int) -> None:
    """A document is a zip, which may be much larger than its file says."""
    try:
        with zipfile.ZipFile(path) as packed:
            size = sum(entry.file_size for entry in packed.infolist())
    except zipfile.BadZipFile:
        reason = "is no Word document: an older .doc, one with a password, or broken"
        raise ReadError(path, reason, "save it as .docx without a password") from None
    if size > max_bytes:
        raise ReadError(path, f"has {size:,} bytes when unpacked, and the limit is {max_bytes:,}", "raise max_bytes")


def _blocks(found: Any, docx: Any) -> Iterator[Block]:
    for part in found.iter_inner_content():
        if isinstance(part, docx.table.Table):
            rows = (" | ".join(_cells(row)) for row in part.rows)
            yield Block("\n".join(row for row in rows if row.strip(" |")))
        elif part.text.strip():
            yield Block(part.text, _level(part))


def _cells(row: Any) -> Iterator[str]:
    """The cells of a row; one that spans several columns is given once."""
    last = None
    for cell in row.cells:
        if cell._tc is not last:
            yield " ".join(cell.text.split())
        last = cell._tc


def _level(paragraph: Any) -> int:
    name = (paragraph.style.name if paragraph.style is not None else "") or ""
    kind, _, level = name.lower().partition(" ")
    if kind == "heading" and level.isdigit():
        return int(level)
    return 1 if kind == "title" else 0
