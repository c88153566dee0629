"""Plain text: one section."""

from collections.abc import Iterator
from pathlib import Path

from jaxsft.rag.readers import file
from jaxsft.rag.records import Document, Section


def read(path: Path, source: str, max_bytes: int) -> Iterator[Document]:
    text = file.text(path)
    if text.strip():
        yield Document(source, path.stem, text, (Section(0, len(text)),))
