"""The store: one LanceDB table of passages and their vectors, and what it was made with.

    passages   a row a passage: its text, vector, place and tags, and a digest of the document it is from
    files      a row a file that is wholly in: its digest
    about      one row: the embedder, and how documents were cut

Every change is one version of a table, so a reader sees all of it or nothing, and whoever is killed leaves nothing half
written. Readers are never locked out; a local store has one writer at a time. A store is a folder, or a place that
LanceDB can write to: s3://, gs://, az://. There nothing locks: see to it that one process writes. One at memory://x
lives as long as what `create` returns.

Text is found by BM25 over words that ICU cuts, since Chinese has no spaces, with English stems and all stop words.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

from jaxsft.rag.extra import need
from jaxsft.run import RunError

FORMAT = 1
LOCK = "writer.lock"
PASSAGES, FILES, ABOUT = "passages", "files", "about"
KEEP = timedelta(hours=1)  # old versions, for readers that are in the middle of one
TEXT_INDEX = "text_idx"  # LanceDB's own name for an index of the column


@dataclass(frozen=True)
class About:
    """What a store was made with."""

    embedder: str  # its name, for people
    digest: str  # of the embedder: vectors of two digests are not comparable
    dim: int
    size: int  # tokens of a passage at most
    overlap: int  # tokens that a passage repeats of the one before it
    format: int = FORMAT


class Store(NamedTuple):
    """An open store."""

    uri: str
    about: About
    passages: Any  # tables of LanceDB
    files: Any


def open(uri: str, embedder: Any = None) -> Store:
    """Opens a store.

    Args:
      uri: a folder, or a URI of an object store.
      embedder: that it is to be used with, if any; see rag.embed.

    Raises:
      RunError: there is no store, it is damaged or of another format, or was made with another embedder.

    Example:
      >>> open("no such folder")
      Traceback (most recent call last):
      ...
      jaxsft.run.RunError: there is no store at no such folder; make one with: scripts/rag.py index --docs FOLDER ...
    """
    if not exists(uri):
        raise RunError(f"there is no store at {uri}; make one with: scripts/rag.py index --docs FOLDER --store {uri}")
    with reading(uri):
        database = connect(uri)
        [row] = database.open_table(ABOUT).search().limit(2).to_list()
        if row["format"] != FORMAT:
            raise RunError(f"{uri} is a store of format {row['format']}, and this reads {FORMAT}; index into a new one")
        store = Store(uri, About(**row), database.open_table(PASSAGES), database.open_table(FILES))
        for table in (store.passages, store.files):
            table.count_rows()
    if embedder is not None:
        check(store, embedder)
    return store


def check(store: Store, embedder: Any) -> None:
    """Sees that an embedder is the one that a store was made with.

    Raises:
      RunError: it is not.
    """
    if embedder.digest != store.about.digest:
        raise RunError(
            f"{store.uri} was made with the embedder {store.about.embedder} ({store.about.digest}), not with "
            f"{embedder.name} ({embedder.digest}), whose vectors mean something else; use --embedder "
            f"{store.about.embedder}, or index into a new store"
        )


def exists(uri: str) -> bool:
    """Whether there is a whole store.

    Raises:
      RunError: there is something else.
    """
    if not remote(uri):
        path = Path(uri)
        if path.exists() and not path.is_dir():
            raise RunError(f"{uri} is a file, and a store is a folder; choose another place")
        known = {LOCK, *(f"{name}.lance" for name in (PASSAGES, FILES, ABOUT))}
        other = sorted({entry.name for entry in path.iterdir()} - known) if path.exists() else []
        if other:
            raise RunError(f"{uri} holds other things than a store ({other[0]}); choose an empty folder or a new one")
        if not path.exists():
            return False
    with reading(uri):
        return {PASSAGES, FILES, ABOUT} <= set(connect(uri).list_tables().tables)


def create(uri: str, about: About) -> Store:
    """Makes an empty store where there is none; what a killed process left of one is replaced.

    Raises:
      RunError: the place cannot be written to, or holds something else.
    """
    if exists(uri):
        raise RunError(f"{uri} is a store already; open it, or choose another place")
    arrow, index = need("pyarrow"), need("lancedb.index")
    texts = index.FTS(base_tokenizer="icu", stem=True, remove_stop_words=False)
    with reading(uri, "written"):
        if not remote(uri):
            Path(uri).mkdir(parents=True, exist_ok=True)
        database = connect(uri)
        _clear(database, uri)
        passages = database.create_table(PASSAGES, schema=schema(about.dim))
        passages.create_index("text", config=texts, name=TEXT_INDEX)
        digests = arrow.schema([("file", arrow.string()), ("digest", arrow.string())])
        files = database.create_table(FILES, schema=digests)
        database.create_table(ABOUT, [asdict(about)])  # last: with it the store is there
    return Store(uri, about, passages, files)


def _clear(database: Any, uri: str) -> None:
    """Drops the tables that a killed process left of a store, which have no row yet, and no others."""
    for name in database.list_tables().tables:
        try:
            rows = database.open_table(name).count_rows()
        except (RuntimeError, ValueError, OSError):  # not even a version of it was written
            rows = 0
        if rows:
            raise RunError(f"{uri} holds a table {name} that is not of a store; choose an empty folder or a new one")
        database.drop_table(name)


def describe(store: Store, about: About) -> Store:
    """Writes down that documents are cut in another way from now on."""
    with reading(store.uri, "written"):
        connect(store.uri).open_table(ABOUT).update(values={"size": about.size, "overlap": about.overlap})
    return store._replace(about=about)


def schema(dim: int) -> Any:
    """The columns of a passage."""
    arrow = need("pyarrow")
    text, number = arrow.string(), arrow.int64()
    return arrow.schema(
        [
            ("id", text),  # source:number
            ("vector", arrow.list_(arrow.float32(), dim)),
            ("text", text),
            ("file", text),
            ("source", text),  # the file, or file#row
            ("number", number),  # of the passage in its document
            ("title", text),
            ("heading", text),
            ("start", number),
            ("end", number),
            ("page", number),
            ("kind", text),  # the file's ending
            ("tags", arrow.list_(text)),  # key=value
            ("digest", text),  # of the document and how it was cut
        ]
    )


def replace(store: Store, rows: Any, sources: Sequence[str], *, new: bool = False) -> None:
    """Puts all passages of some documents in place of those that are there, in one version.

    Args:
      rows: an Arrow table by `schema`, of whole documents.
      sources: of the documents; one may have no rows any more.
      new: none of them has passages in the store.
    """
    with reading(store.uri, "written"):
        if new:
            store.passages.add(rows)
        elif not rows.num_rows:
            store.passages.delete(among("source", sources))
        else:
            merge = store.passages.merge_insert("id").when_matched_update_all().when_not_matched_insert_all()
            merge.when_not_matched_by_source_delete(among("source", sources)).execute(rows)


def settle(store: Store, digests: Mapping[str, str]) -> None:
    """Writes down that all documents of these files are in: {file: digest}."""
    if digests:
        rows = [{"file": file, "digest": digest} for file, digest in digests.items()]
        with reading(store.uri, "written"):
            merge = store.files.merge_insert("file").when_matched_update_all().when_not_matched_insert_all()
            merge.execute(rows)


def forget(store: Store, files: Sequence[str]) -> None:
    """Takes files out, with all their passages."""
    for start in range(0, len(files), 1000):
        gone = among("file", files[start : start + 1000])
        with reading(store.uri, "written"):
            store.passages.delete(gone)
            store.files.delete(gone)


def settled(store: Store) -> dict[str, str]:
    """The files that are wholly in: {file: digest}."""
    with reading(store.uri):
        rows = store.files.search().select(["file", "digest"]).limit(None).to_arrow()
    return dict(zip(rows["file"].to_pylist(), rows["digest"].to_pylist(), strict=True))


def begun(store: Store) -> set[str]:
    """The files that have passages, wholly in or not."""
    with reading(store.uri):
        rows = store.passages.search().where("number = 0").select(["file"]).limit(None).to_arrow()
    return set(rows["file"].unique().to_pylist())


def documents(store: Store, file: str) -> dict[str, str]:
    """The documents of a file that are in: {source: digest}."""
    with reading(store.uri):
        query = store.passages.search().where(f"number = 0 AND {among('file', [file])}")
        rows = query.select(["source", "digest"]).limit(None).to_arrow()
    return dict(zip(rows["source"].to_pylist(), rows["digest"].to_pylist(), strict=True))


def texts(store: Store) -> list[str]:
    """All passages, as what a retriever is to choose among."""
    with reading(store.uri):
        return store.passages.search().select(["text"]).limit(None).to_arrow()["text"].to_pylist()


def tidy(store: Store, vectors: int) -> None:
    """Merges what many small changes left, brings the indexes up to date, and deletes old versions.

    Args:
      vectors: from so many passages on, vectors have an index too; below, every one is compared.
    """
    index = need("lancedb.index")
    with reading(store.uri, "written"):
        store.passages.optimize(cleanup_older_than=KEEP)
        store.files.optimize(cleanup_older_than=KEEP)
        indexed = any(one.columns == ["vector"] for one in store.passages.list_indices())
        if not indexed and store.passages.count_rows() >= vectors:
            store.passages.create_index("vector", config=index.IvfSq(distance_type="cosine"))


def among(column: str, values: Sequence[str]) -> str:
    """SQL: the column has one of these values.

    Example:
      >>> among("file", ["it's.txt", "b.txt"])
      "file IN ('it''s.txt', 'b.txt')"
    """
    return f"{column} IN ({', '.join(map(quoted, values))})"


def quoted(value: str) -> str:
    """A string of SQL, whatever is in it.

    Example:
      >>> quoted("it's")
      "'it''s'"
    """
    return "'" + value.replace("'", "''") + "'"


def remote(uri: str) -> bool:
    return "://" in uri


def connect(uri: str) -> Any:
    # Each read looks for a newer version first: whoever talks for hours sees what was indexed a moment ago.
    return need("lancedb").connect(uri, read_consistency_interval=timedelta(0))


@contextmanager
def reading(uri: str, what: str = "read") -> Iterator[None]:
    """Turns what LanceDB and Arrow raise into one clear error."""
    try:
        yield
    except RunError:
        raise
    except Exception as error:  # RuntimeError, ValueError, OSError, and whatever else comes out of Rust
        reason = " ".join(str(error).split())[:300]
        remedy = "if it is damaged, delete it and index again"
        raise RunError(f"the store {uri} cannot be {what}: {reason}; {remedy}") from error


@contextmanager
def writing(uri: str) -> Iterator[None]:
    """Holds the store for this process alone to write; the lock ends with the process, however that ends.

    Raises:
      RunError: another process holds it.
    """
    if remote(uri):
        yield
        return
    import fcntl

    exists(uri)  # nothing is written into a folder that is something else
    try:
        Path(uri).mkdir(parents=True, exist_ok=True)
        descriptor = os.open(Path(uri) / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise RunError(f"the store {uri} cannot be written: {error.strerror}; choose another place") from None
    with os.fdopen(descriptor, "r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = file.read().strip() or "unknown"
            raise RunError(f"process {holder} is writing to {uri}; wait until it is done, or stop it") from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
