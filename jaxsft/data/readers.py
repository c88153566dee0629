"""Readers of files, one after the other row, so that a file may be larger than memory.

A row that cannot be read comes out as `Bad`, and reading goes on behind it where the file allows that; where it does
not, `DataError` says where it broke.
"""

import csv
import gzip
import io
import json
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import IO, Any

from jaxsft.data.rows import Bad, DataError, Row

PIECE = 1 << 20  # bytes or characters read at a time


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.name.lower().endswith(".gz") else open(path, "rb")  # type: ignore[return-value]


def to_row(fields: Any, place: str, path: Path) -> Row | Bad:
    """A row of what a file holds; a null counts as absent."""
    if not isinstance(fields, dict):
        found = json.dumps(fields, ensure_ascii=True, default=str)[:40]
        return Bad(place, f'{found} is no row; expected an object such as {{"instruction": "...", "output": "..."}}')
    return Row({key: value for key, value in fields.items() if value is not None}, place, str(path.parent))


def _clean(fields: Any, text: str, place: str, path: Path) -> Row | Bad:
    """A row of JSON, unless it has half a surrogate pair, which JSON can write and no tokenizer can read."""
    if "\\u" in text:
        try:
            json.dumps(fields, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = error.object[error.start].encode("unicode_escape").decode()
            return Bad(place, f"{half} is half of a surrogate pair; write the whole character")
    return to_row(fields, place, path)


def _lines(path: Path) -> Iterator[tuple[int, str | Bad]]:
    """Lines that are not blank, with their numbers. Only \\n ends one: U+2028 may stand inside a JSON string."""
    with _open(path) as stream:
        for number, data in enumerate(stream, 1):
            try:
                text = data.decode("utf-8")
            except UnicodeDecodeError as error:
                yield number, Bad(f"{path} line {number}", _not_utf8(data, error))
                continue
            text = text.removeprefix("\ufeff") if number == 1 else text
            if text.strip():
                yield number, text.removesuffix("\n").removesuffix("\r")


def _not_utf8(data: bytes, error: UnicodeDecodeError) -> str:
    return f"byte {data[error.start]:#04x} at offset {error.start} is not UTF-8; save the file as UTF-8"


def _jsonl(path: Path) -> Iterator[Row | Bad]:
    for number, text in _lines(path):
        place = f"{path} line {number}"
        if isinstance(text, Bad):
            yield text
            continue
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError) as error:  # not JSON, too many digits, nested too deep
            at, why = (f", column {error.colno}", error.msg) if isinstance(error, json.JSONDecodeError) else ("", error)
            yield Bad(place + at, f"not valid JSON ({why}); each line must be one whole object")
        else:
            yield _clean(fields, text, place, path)


def _txt(path: Path) -> Iterator[Row | Bad]:
    for number, text in _lines(path):
        place = f"{path} line {number}"
        yield text if isinstance(text, Bad) else Row({"text": text}, place, str(path.parent))


def _json(path: Path) -> Iterator[Row | Bad]:
    """An array of objects, read piece by piece: one value is decoded as soon as its text is complete."""
    with closing(_Text(path)) as reader:
        yield from _array(reader, path)


def _array(reader: "_Text", path: Path) -> Iterator[Row | Bad]:
    if not reader.skip():
        return
    if reader.text[reader.at] != "[":
        found = type(reader.value()[0]).__name__
        if not reader.skip():
            raise DataError(f"{path} holds one {found}; expected an array of objects, [{{...}}, {{...}}]")
        raise reader.fail("Extra data")
    reader.at += 1
    number = 0
    while reader.skip() and reader.text[reader.at] != "]":
        if number and reader.text[reader.at] != ",":
            raise reader.fail("Expecting ',' delimiter")
        if number:
            reader.at += 1
            reader.skip()
        number += 1
        yield _clean(*reader.value(), f"{path} row {number}", path)
    if reader.at >= len(reader.text):
        raise reader.fail("Expecting ',' delimiter or ']'")
    reader.at += 1
    if reader.skip():
        raise reader.fail("Extra data")


class _Text:
    """A file's text in a window that moves on, with a cursor in it."""

    def __init__(self, path: Path):
        self.path, self.text, self.at, self.line, self.column = path, "", 0, 1, 1
        self._stream = io.TextIOWrapper(_open(path), encoding="utf-8-sig", newline="\n")
        self._decoder = json.JSONDecoder()

    def close(self) -> None:
        self._stream.close()

    def more(self, size: int = PIECE) -> bool:
        """Reads on, dropping what lies before the cursor; False at the end."""
        try:
            new = self._stream.read(size)
        except UnicodeDecodeError as error:
            raise _find_not_utf8(self.path, error) from error
        if new:
            self.line, self.column = self._place(self.at)
            self.text, self.at = self.text[self.at :] + new, 0
        return bool(new)

    def skip(self) -> bool:
        """Goes over white space; False if there is nothing behind it."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in " \t\r\n":
                self.at += 1
            if self.at < len(self.text):
                return True
            if not self.more():
                return False

    def value(self) -> tuple[Any, str]:
        """Decodes the value at the cursor, and gives its text."""
        while True:
            try:
                found, end = self._decoder.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                # Wrong, or only not all here yet. Windows double, so that a long value is decoded a few times at most.
                near_end = error.pos + 64 >= len(self.text) or error.msg.startswith("Unterminated string")
                if near_end and self.more(max(PIECE, len(self.text) - self.at)):
                    continue
                raise self.fail(error.msg, error.pos) from error
            except (RecursionError, ValueError) as error:  # nested too deep; an integer of too many digits
                raise self.fail(str(error)) from error
            if end + 2 < len(self.text) or not self.more():  # a number may go on behind the window: 1e+
                start, self.at = self.at, end
                return found, self.text[start:end]

    def fail(self, why: str, at: int | None = None) -> DataError:
        line, column = self._place(self.at if at is None else at)
        remedy = "repair it, or name the file .jsonl if each line is an object"
        return DataError(f"{self.path} line {line}, column {column}: not valid JSON ({why}); {remedy}")

    def _place(self, at: int) -> tuple[int, int]:
        breaks = self.text.count("\n", 0, at)
        column = at - self.text.rfind("\n", 0, at) if breaks else self.column + at
        return self.line + breaks, column


def _find_not_utf8(path: Path, error: UnicodeDecodeError) -> DataError:
    """Reads again by lines to say where the byte is."""
    for _, line in _lines(path):
        if isinstance(line, Bad):
            return DataError(str(line))
    return DataError(f"{path} is not UTF-8 ({error.reason}); save the file as UTF-8")


def _csv(path: Path) -> Iterator[Row | Bad]:
    with io.TextIOWrapper(_open(path), encoding="utf-8-sig", newline="") as stream:
        lines = csv.reader(stream, strict=True)
        csv.field_size_limit(1 << 30)
        try:
            header = next(lines, [])
            for values in filter(None, lines):
                place = f"{path} line {lines.line_num}"
                if len(values) == len(header):
                    yield to_row(dict(zip(header, values, strict=True)), place, path)
                else:
                    counts = f"{len(values)} values, the header {len(header)}"
                    yield Bad(place, f"the row has {counts}; quote values that hold commas")
        except csv.Error as error:
            remedy = "repair it, or convert the file to .jsonl"
            raise DataError(f"{path} line {lines.line_num}: {error}; {remedy}") from error
        except UnicodeDecodeError as error:
            raise _find_not_utf8(path, error) from error


@contextmanager
def _seekable(path: Path) -> Iterator[str]:
    """A path of the file itself, unpacked into a temporary one if it is a gzip."""
    if not path.name.lower().endswith(".gz"):
        yield str(path)
        return
    with tempfile.NamedTemporaryFile() as plain, _open(path) as packed:
        while piece := packed.read(PIECE):
            plain.write(piece)
        plain.flush()
        yield plain.name


def _parquet(path: Path) -> Iterator[Row | Bad]:
    import pyarrow
    import pyarrow.parquet

    with _seekable(path) as plain:
        try:
            yield from _tables(pyarrow.parquet.ParquetFile(plain).iter_batches(1024), path)
        except (pyarrow.ArrowInvalid, OSError) as error:
            raise DataError(f"{path} is no parquet file ({error}); write it again") from error


def _arrow(path: Path) -> Iterator[Row | Bad]:
    """Arrow's file format, or its stream format, which data sets on disk have."""
    import pyarrow

    with _seekable(path) as plain:
        try:
            with pyarrow.memory_map(plain) as stream:
                try:
                    reader = pyarrow.ipc.open_file(stream)
                    batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
                except pyarrow.ArrowInvalid:
                    stream.seek(0)
                    batches = iter(pyarrow.ipc.open_stream(stream))
                yield from _tables(batches, path)
        except (pyarrow.ArrowInvalid, OSError) as error:
            raise DataError(f"{path} is no arrow file ({error}); write it again") from error


def _tables(batches: Iterator[Any], path: Path) -> Iterator[Row | Bad]:
    number = 0
    for batch in batches:
        for start in range(0, batch.num_rows, 1024):
            for fields in batch.slice(start, 1024).to_pylist():
                number += 1
                yield to_row(fields, f"{path} row {number}", path)


READERS = {".json": _json, ".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet, ".arrow": _arrow, ".txt": _txt}
