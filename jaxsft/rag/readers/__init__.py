"""Readers of documents, one file a format: what is in a file, as text with sections.

A format is a function in a file of its own and a line in `READERS`.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

from jaxsft.rag.readers import csv, docx, html, json, markdown, pdf, txt
from jaxsft.rag.readers.file import MAX_BYTES, ReadError
from jaxsft.rag.records import Document

__all__ = ["MAX_BYTES", "READERS", "SUFFIXES", "ReadError", "read", "source"]

Reader = Callable[[Path, str, int], Iterator[Document]]  # (path, source, max_bytes)
READERS: dict[str, Reader] = {
    ".txt": txt.read,
    ".md": markdown.read,
    ".markdown": markdown.read,
    ".html": html.read,
    ".htm": html.read,
    ".pdf": pdf.read,
    ".docx": docx.read,
    ".csv": csv.read,
    ".json": json.read,
    ".jsonl": json.read_lines,
}
SUFFIXES = tuple(READERS)
STREAMED = (".csv", ".jsonl")  # read row by row, however large they are


def source(folder: Path, file: Path) -> str:
    """What a file is called: the way from the folder to it.

    Example:
      >>> source(Path("docs"), Path("docs/lamps/oil.md"))
      'lamps/oil.md'
    """
    return file.relative_to(folder).as_posix() if file.is_relative_to(folder) else file.name


def read(folder: Path, file: Path, *, max_bytes: int = MAX_BYTES) -> Iterator[Document]:
    """Reads the documents of a file: one, or one for each row of a table; none where nothing is in it.

    A table is read while its documents are taken, so an error of a row comes behind the documents before it.

    Args:
      folder: that sources are told from.
      file: in it.
      max_bytes: the largest file to read; tables (csv, jsonl) may be larger, and each value of theirs may not.

    Raises:
      ReadError: the file cannot be read, is no kind that is known, or is not what its ending says.

    Example:
      >>> found = next(read(Path("jaxsft"), Path("jaxsft/assets/base/README.md")))
      >>> found.source, found.sections[0].heading
      ('assets/base/README.md', 'The base model')
    """
    kind = file.suffix.lower()
    if kind not in READERS:
        raise ReadError(file, f"is of no known kind {kind!r}", f"there are {', '.join(READERS)}")
    try:
        size = file.stat().st_size
        if size > max_bytes and kind not in STREAMED:
            reason = f"has {size:,} bytes, and the limit is {max_bytes:,}"
            raise ReadError(file, reason, "raise max_bytes, or cut the file into several")
        if size:
            yield from READERS[kind](file, source(folder, file), max_bytes)
    except OSError as error:
        raise ReadError(
            file, f"cannot be read ({error.strerror or error})", "see that it is there and may be read"
        ) from None
