"""JSON: a document for each object of a list, or of an only object; JSON lines: one for each, read line by line."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxsft.data.readers import READERS as ROWS
from jaxsft.data.rows import Bad
from jaxsft.rag.readers import file, table
from jaxsft.rag.readers.file import ReadError
from jaxsft.rag.records import Document


def read(path: Path, source: str, max_bytes: int) -> Iterator[Document]:
    text = file.text(path)
    if not text.strip():
        return
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}: not valid JSON ({error.msg})"
        raise ReadError(path, where, "repair it, or name it .jsonl if each line is an object") from None
    except (RecursionError, ValueError) as error:  # nested too deep; a number of too many digits
        raise ReadError(path, f"not valid JSON ({error})", "repair it") from None
    rows = found if isinstance(found, list) else [found]
    for number, fields in enumerate(rows, 1):
        if not isinstance(fields, dict):
            reason = f"row {number} is {_kind(fields)}; a document is an object with named values"
            raise ReadError(path, reason, 'write {"text": "..."}')
        place = f"{source}#{number}" if isinstance(found, list) else source
        if one := table.document(fields, place, path.stem):
            yield one


def _kind(value: Any) -> str:
    return "a list" if isinstance(value, list) else json.dumps(value, ensure_ascii=False)[:40]


def read_lines(path: Path, source: str, max_bytes: int) -> Iterator[Document]:
    for number, row in enumerate(ROWS[".jsonl"](path), 1):
        if isinstance(row, Bad):
            place, _, remedy = row.reason.rpartition("; ")
            raise ReadError(path, f"{row.place.removeprefix(f'{path} ')}: {place or remedy}", remedy or "repair it")
        if found := table.document(row.fields, f"{source}#{number}", path.stem):
            yield found
