"""Rows from files: json, jsonl, csv, parquet, txt, or a data set of the Hugging Face hub.

A row keeps its place, `train.jsonl line 12`, so that whoever cannot use it can say where it stands. Nothing is skipped
but blank lines: a row that cannot be read stops the run before it starts.
"""

import csv
import difflib
import glob
import io
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

HUB = re.compile(r"(?P<name>[\w.-]+(/[\w.-]+)?)(@(?P<subset>[\w.-]+))?(:(?P<split>\S+))?", re.ASCII)


class DataError(ValueError):
    """The data cannot be used as it is; the message says where and what to do."""


class Row(NamedTuple):
    """One row as it was found."""

    fields: dict[str, Any]
    place: str  # "train.jsonl line 12", "train.json row 3"


def read(path: str | Sequence[str]) -> list[Row]:
    """Reads all rows of a file, a glob pattern, a hub data set, or several of them one after the other.

    Args:
      path: "train.jsonl", "data/*.csv", "org/name", "org/name@subset:split"; the split is train by default.

    Returns:
      rows in order; a value that is null counts as absent.

    Raises:
      DataError: a file is missing, empty, not UTF-8 or malformed, or a row is no object.

    Example:
      >>> row = read("jaxsft/assets/quickstart/train.jsonl")[0]
      >>> row.place, list(row.fields)
      ('jaxsft/assets/quickstart/train.jsonl line 1', ['instruction', 'input', 'output'])
    """
    if not isinstance(path, str):
        return [row for one in path for row in read(one)]
    name = os.path.expanduser(path)
    files = [name] if os.path.isfile(name) else sorted(filter(os.path.isfile, glob.glob(name, recursive=True)))
    if files:
        return [row for file in files for row in _file(Path(file))]
    hub = HUB.fullmatch(path)
    if hub and Path(hub["name"]).suffix not in READERS and not os.path.exists(name):
        return _hub(path, hub)
    raise DataError(f"{path!r} is no file{_nearby(Path(name))}")


def _nearby(path: Path) -> str:
    """What is there instead of a file that is not."""
    if path.is_dir():
        return f" but a folder; name the files in it, such as {path}/*.jsonl"
    folder = next(p for p in path.parents if p.is_dir())
    names = sorted(os.listdir(folder))
    close = difflib.get_close_matches(path.name, names, n=1)
    listed = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    return f"; {folder}/ holds {listed or 'nothing'}" + (f". Did you mean {folder / close[0]}?" if close else "")


def _file(path: Path) -> list[Row]:
    if path.suffix not in READERS:
        raise DataError(f"{path} is of no known kind {path.suffix!r}; there are {', '.join(READERS)}")
    rows = list(READERS[path.suffix](path))
    if not rows:
        raise DataError(f"{path} is empty; it must hold at least one row")
    return rows


def _row(fields: Any, place: str) -> Row:
    if not isinstance(fields, dict):
        raise DataError(
            f"{place} is {json.dumps(fields, ensure_ascii=True, default=str)[:40]}; expected an object such as "
            '{"instruction": "...", "output": "..."}'
        )
    return Row({key: value for key, value in fields.items() if value is not None}, place)


def _text(path: Path) -> str:
    data = path.read_bytes()
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        where = f"{path} line {line}: byte {data[error.start]:#04x} at offset {error.start}"
        raise DataError(f"{where} is not UTF-8; save the file as UTF-8") from error


def _parse(text: str, path: Path, line: int, remedy: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"{path} line {line + error.lineno - 1}, column {error.colno}"
        raise DataError(f"{where}: not valid JSON ({error.msg}); {remedy}") from error


def _clean(row: Row) -> Row:
    """Refuses half a surrogate pair, which JSON can write and no tokenizer can read."""
    try:
        json.dumps(row.fields, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start].encode("unicode_escape").decode()
        raise DataError(f"{row.place} has {half}, half of a surrogate pair; write the whole character") from error
    return row


def _json(path: Path) -> Iterator[Row]:
    text = _text(path)
    remedy = "repair it, or name the file .jsonl if each line is an object"
    found = _parse(text, path, 1, remedy) if text.strip() else []
    if not isinstance(found, list):
        raise DataError(f"{path} holds one {type(found).__name__}; expected an array of objects, [{{...}}, {{...}}]")
    for number, fields in enumerate(found, 1):
        yield _clean(_row(fields, f"{path} row {number}"))


def _jsonl(path: Path) -> Iterator[Row]:
    # Not splitlines: U+2028 and its kin end a line there, and may stand unescaped inside a JSON string.
    for number, line in enumerate(_text(path).split("\n"), 1):
        if line.strip():
            fields = _parse(line, path, number, "each line must be one whole object")
            yield _clean(_row(fields, f"{path} line {number}"))


def _csv(path: Path) -> Iterator[Row]:
    lines = csv.reader(io.StringIO(_text(path), newline=""), strict=True)
    try:
        header = next(lines, [])
        for values in filter(None, lines):
            place = f"{path} line {lines.line_num}"
            if len(values) != len(header):
                raise DataError(f"{place} has {len(values)} values, the header {len(header)}; quote those with commas")
            yield _row(dict(zip(header, values, strict=True)), place)
    except csv.Error as error:
        raise DataError(f"{path} line {lines.line_num}: {error}; repair it, or convert the file to .jsonl") from error


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise DataError(f"{path} is no parquet file ({error}); write it again") from error
    for number, fields in enumerate(table.to_pylist(), 1):
        yield _row(fields, f"{path} row {number}")


def _txt(path: Path) -> Iterator[Row]:
    for number, line in enumerate(_text(path).split("\n"), 1):
        if line.strip():
            yield Row({"text": line.removesuffix("\r")}, f"{path} line {number}")


READERS = {".json": _json, ".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet, ".txt": _txt}


def _hub(path: str, hub: re.Match) -> list[Row]:
    import datasets

    try:
        found = datasets.load_dataset(hub["name"], hub["subset"], split=hub["split"] or "train")
    except Exception as error:
        problem = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise DataError(f"{path!r} is neither on the hub ({problem}) nor a file{_nearby(Path(path))}") from error
    return [_row(dict(fields), f"{path} row {number}") for number, fields in enumerate(found, 1)]
