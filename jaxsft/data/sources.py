"""Where rows come from: files and gzip of them, folders, globs, data sets of the hub.

Each row keeps its place, `train.jsonl line 12`; `read` stops at one that cannot be used, `scan` gives it out as `Bad`,
for its caller to decide.
"""

import difflib
import glob
import gzip
import hashlib
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxsft.data.readers import PIECE, READERS, to_row
from jaxsft.data.rows import Bad, DataError, Row

HUB = re.compile(r"(?P<name>[\w.-]+(/[\w.-]+)?)(@(?P<subset>[\w.-]+))?(:(?P<split>\S+))?", re.ASCII)


def read(path: str | Sequence[str]) -> Iterator[Row]:
    """Yields the rows of a file, a folder, a glob pattern, a hub data set, or several of them one after the other.

    Args:
      path: "train.jsonl", "data/*.csv.gz", "folder", "org/name", "org/name@subset:split" (split train by
        default).

    Yields:
      rows in order; a value that is null counts as absent.

    Raises:
      DataError: a file is missing, empty, not UTF-8 or malformed, or a row is no object.

    Example:
      >>> row = next(read("jaxsft/assets/quickstart/train.jsonl"))
      >>> row.place, list(row.fields)
      ('jaxsft/assets/quickstart/train.jsonl line 1', ['instruction', 'input', 'output'])
    """
    for one in [path] if isinstance(path, str) else path:
        for row in scan(one):
            if isinstance(row, Bad):
                raise DataError(str(row))
            yield row


def scan(path: str) -> Iterator[Row | Bad]:
    """Yields the rows of one path as `read` does, and what is no row as `Bad`.

    Raises:
      DataError: the path is nothing that can be read; a file has nothing behind the place that is broken.
    """
    found = files(path)
    if found:
        for file in found:
            yield from _file(Path(file))
    else:
        yield from _hub(path)


def files(path: str) -> list[str]:
    """The files that a path means, in order; none for a data set of the hub.

    Raises:
      DataError: nothing is there.

    Example:
      >>> files("jaxsft/assets/quickstart")
      ['jaxsft/assets/quickstart/heldout.jsonl', 'jaxsft/assets/quickstart/train.jsonl']
    """
    name = os.path.expanduser(path)
    if os.path.isfile(name):
        return [name]
    if os.path.isdir(name):
        inside = sorted(str(file) for file in Path(name).rglob("*") if file.is_file() and kind(file) in READERS)
        if not inside:
            raise DataError(f"{path} is a folder without data files; it needs some that end with {', '.join(READERS)}")
        return inside
    if inside := sorted(filter(os.path.isfile, glob.glob(name, recursive=True))):
        return inside
    hub = HUB.fullmatch(path)
    if hub and kind(Path(hub["name"])) not in READERS:
        return []
    raise DataError(f"{path!r} is no file{_nearby(Path(name))}")


def digest(path: str) -> str:
    """A digest of what a path holds, by content: file names count for their kind alone.

    Example:
      >>> len(digest("jaxsft/assets/quickstart/train.jsonl"))
      32
    """
    found, hasher = files(path), hashlib.blake2b(digest_size=16)
    for file in found:
        own = hashlib.blake2b(digest_size=16)
        with open(file, "rb") as stream:
            while piece := stream.read(PIECE):
                own.update(piece)
        hasher.update(f"{kind(Path(file))}{'.gz' * file.lower().endswith('.gz')} {own.hexdigest()}\n".encode())
    if not found:
        hasher.update(load_hub(path)._fingerprint.encode())
    return hasher.hexdigest()


def kind(path: Path) -> str:
    """The ending that tells how a file is read, .gz left out.

    Example:
      >>> kind(Path("train.JSONL.gz"))
      '.jsonl'
    """
    name = path.name.lower()
    return Path(name.removesuffix(".gz")).suffix


def _nearby(path: Path) -> str:
    """What is there instead of a file that is not."""
    folder = next((p for p in path.parents if p.is_dir()), Path("."))
    names = sorted(os.listdir(folder))
    close = difflib.get_close_matches(path.name, names, n=1)
    listed = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    return f"; {folder}/ holds {listed or 'nothing'}" + (f". Did you mean {folder / close[0]}?" if close else "")


def _file(path: Path) -> Iterator[Row | Bad]:
    if kind(path) not in READERS:
        raise DataError(f"{path} is of no known kind {path.suffix!r}; there are {', '.join(READERS)}, and .gz of them")
    empty = True
    try:
        for row in READERS[kind(path)](path):
            empty = False
            yield row
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path} is no whole gzip file ({error}); pack it again") from error
    if empty:
        raise DataError(f"{path} is empty; it must hold at least one row")


def load_hub(path: str) -> Any:
    import datasets

    hub = HUB.fullmatch(path)
    assert hub
    try:
        return datasets.load_dataset(hub["name"], hub["subset"], split=hub["split"] or "train")
    except Exception as error:
        problem = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise DataError(f"{path!r} is neither on the hub ({problem}) nor a file{_nearby(Path(path))}") from error


def _hub(path: str) -> Iterator[Row | Bad]:
    for number, fields in enumerate(load_hub(path), 1):
        yield to_row(dict(fields), f"{path} row {number}", Path())
