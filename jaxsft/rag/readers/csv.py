"""Tables in CSV: a document for each row, read row by row.

The header names the columns. What parts them, a comma, a semicolon, a tab or a bar, is what the header has most of.
"""

import csv
from collections.abc import Iterator
from pathlib import Path

from jaxsft.rag.readers import file, table
from jaxsft.rag.readers.file import ReadError
from jaxsft.rag.records import Document

PARTS = ",;\t|"


def read(path: Path, source: str, max_bytes: int) -> Iterator[Document]:
    csv.field_size_limit(max_bytes)
    with path.open(encoding=file.encoding(path), newline="") as stream:
        start = stream.readline()
        stream.seek(0)
        lines = csv.reader(stream, delimiter=max(PARTS, key=start.count), strict=True)
        rows = (row for row in lines if any(map(str.strip, row)))
        try:
            header = [name.strip() for name in next(rows, [])]
            for number, values in enumerate(rows, 1):
                if len(values) != len(header):
                    found = f"line {lines.line_num} has {len(values)} values, the header {len(header)}"
                    raise ReadError(path, found, "quote values that hold what parts them")
                fields = dict(zip(header, (file.check(path, value) for value in values), strict=True))
                if found := table.document(fields, f"{source}#{number}", path.stem):
                    yield found
        except csv.Error as error:
            raise ReadError(
                path, f"line {lines.line_num}: {error}", "repair it, or convert the file to .jsonl"
            ) from None
        except UnicodeDecodeError as error:
            found = f"behind line {lines.line_num} is not {error.encoding}"
            raise ReadError(path, found, "save it as UTF-8") from None
