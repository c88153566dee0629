"""PDF: a section for each page. Text alone is read; a scan has none."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxsft.rag.extra import need
from jaxsft.rag.readers import outline
from jaxsft.rag.readers.file import ReadError
from jaxsft.rag.records import Document


def read(path: Path, source: str, max_bytes: int) -> Iterator[Document]:
    logging.getLogger("pypdf").setLevel(logging.ERROR)  # it tells of each repair that it makes
    pypdf = need("pypdf")
    try:
        reader = pypdf.PdfReader(path)
        _unlock(path, reader)
        pages = [page.extract_text() for page in reader.pages]
        title = reader.metadata.title if reader.metadata else None
    except ReadError:
        raise
    except Exception as error:  # a broken file breaks the parser in any way
        reason = f"is a broken PDF ({type(error).__name__}: {error})"
        raise ReadError(path, reason, "open it in a viewer and save or print it as a new PDF") from None
    if not any(page.strip() for page in pages):
        reason = f"has no text on its {len(pages)} pages, which is so where they are pictures (a scan)"
        raise ReadError(path, reason, "recognise its text first, for example with ocrmypdf")
    blocks = [outline.Block(page, page=number) for number, page in enumerate(pages, 1)]
    yield outline.document(source, outline.whole(str(title or "")).strip() or path.stem, blocks)


def _unlock(path: Path, reader: Any) -> None:
    """Opens what is locked for printing or changes, and has no password for reading."""
    if reader.is_encrypted and not reader.decrypt(""):
        raise ReadError(path, "is encrypted with a password", "save a copy without one")
