"""The index: brings a store up to date with a folder of documents, by what is in them.

    files -> digests -> new or changed ones -> documents -> those that differ -> passages -> vectors -> store

Whoever is killed only starts again: a document's passages are put in place in one version of the store, and a file
counts as done when all its documents are in. Passages of many documents are embedded together. What cannot be read is
told at the end, and what was indexed of it before stays.

Left out: times of files are not trusted, so each update reads the bytes of all files.
"""

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxsft.rag import readers, store
from jaxsft.rag.extra import need
from jaxsft.rag.readers import ReadError
from jaxsft.rag.records import Document, Passage
from jaxsft.rag.split import split
from jaxsft.rag.store import Store
from jaxsft.run import RunError

GROUP = 1024  # passages that are written together; one document may have more
EMBEDDED = 256  # passages that are embedded together
TIDY = 64  # groups between two times that the store is tidied
VECTORS = 200_000  # passages from which on vectors have an index: benchmarks/rag.py
OPEN = "~$"  # what Word puts before the name of a document that is open


class Failure(NamedTuple):
    """A file that could not be read."""

    file: str
    reason: str


class Ready(NamedTuple):
    """A document that differs from what is in the store; without passages it is to be taken out."""

    file: str
    source: str
    digest: str
    passages: list[Passage]
    new: bool  # the store has nothing of it


class Done(NamedTuple):
    """A file whose documents have all been told."""

    file: str
    digest: str
    new: bool
    size: int  # bytes


class Plan(NamedTuple):
    """What an update has to do."""

    todo: list[tuple[Done, Path]]
    gone: list[str]
    same: int
    failed: list[Failure]


@dataclass
class Outcome:
    """What an update did."""

    new: int = 0  # files
    changed: int = 0
    gone: int = 0
    same: int = 0
    documents: int = 0  # written or taken out of files that are still there
    passages: int = 0  # written
    failed: list[Failure] = field(default_factory=list)


class Progress(NamedTuple):
    """How far an update has come."""

    files: int
    of_files: int
    size: int  # bytes of files that are done
    of_size: int
    passages: int


def update(
    into: Store,
    folder: Path,
    embedder: Any,
    *,
    max_bytes: int = readers.MAX_BYTES,
    vectors: int = VECTORS,
    show: Callable[[Progress], None] = lambda _: None,
) -> Outcome:
    """Brings a store up to date with a folder; the caller holds `store.writing`.

    Args:
      into: a store that was made with this embedder; it says how documents are cut.
      folder: of documents; files whose ending no reader knows, and hidden ones, are left alone.
      embedder: see rag.embed.
      max_bytes: the largest file to read; a table may be larger, since it is read row by row.
      vectors: passages from which on the vectors have an index.
      show: is told how far it has come.

    Raises:
      RunError: there is no folder, or the store cannot be read or written.
    """
    begun = store.begun(into)
    plan = _plan(folder, store.settled(into), begun, settings(into))
    store.forget(into, plan.gone)
    outcome = Outcome(gone=len(plan.gone), same=plan.same, failed=list(plan.failed))
    steps = _steps(into, folder, plan.todo, begun, embedder, max_bytes)
    state = Progress(0, len(plan.todo), 0, sum(done.size for done, _ in plan.todo), 0)
    for number, group in enumerate(_groups(steps), 1):
        ready = [step for step in group if isinstance(step, Ready)]
        finished = [step for step in group if isinstance(step, Done)]
        made = []
        for vectors_of in _embed(ready, embedder):
            made.append(vectors_of)
            state = state._replace(passages=state.passages + len(vectors_of))
            show(state)
        _write(into, ready, np.concatenate(made))
        store.settle(into, {done.file: done.digest for done in finished})
        outcome.documents += len(ready)
        outcome.new += sum(done.new for done in finished)
        outcome.changed += sum(not done.new for done in finished)
        outcome.failed += [step for step in group if isinstance(step, Failure)]
        size = state.size + sum(done.size for done in finished)
        state = state._replace(files=state.files + len(finished), size=size)
        show(state)
        if number % TIDY == 0:
            store.tidy(into, vectors)
    outcome.passages = state.passages
    store.tidy(into, vectors)
    return outcome


def settings(into: Store) -> str:
    """What a document's passages depend on beside the document."""
    about = into.about
    return f"{store.FORMAT} {about.digest} {about.size} {about.overlap}"


def files(folder: Path) -> tuple[dict[str, Path], list[Failure]]:
    """The files of a folder, and of the folders in it, that a reader knows.

    Returns:
      {source: path}, and folders that cannot be looked into.

    Raises:
      RunError: there is no such folder.
    """
    if not folder.is_dir():
        raise RunError(f"there is no folder {folder} with documents; give --docs the folder to index")
    found, closed = {}, []
    why = lambda error: closed.append(Failure(f"{readers.source(folder, Path(error.filename))}/", _reason(error)))
    for at, folders, names in os.walk(folder, onerror=why):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            path = Path(at, name)
            known = name.lower().endswith(readers.SUFFIXES) and not name.startswith((".", OPEN))
            if known and path.is_file():  # no pipe, which nobody may ever write to
                found[readers.source(folder, path)] = path
    return dict(sorted(found.items())), closed


def _reason(error: OSError) -> str:
    return f"cannot be read ({error.strerror or error})"


def _plan(folder: Path, before: Mapping[str, str], begun: set[str], how: str) -> Plan:
    """Compares the files of a folder with what a store has of them."""
    found, failed = files(folder)
    closed = tuple(name for name, _ in failed)  # whether what was in there is gone nobody knows
    todo, same = [], 0
    for name, path in found.items():
        try:
            name.encode()
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, lambda: hashlib.blake2b(how.encode(), digest_size=16)).hexdigest()
            if before.get(name) == digest:
                same += 1
            else:
                todo.append((Done(name, digest, name not in before, path.stat().st_size), path))
        except UnicodeEncodeError:
            shown = name.encode("utf-8", "replace").decode()
            failed.append(Failure(shown, "has a name that is not UTF-8"))
        except OSError as error:
            failed.append(Failure(name, _reason(error)))
    gone = [name for name in sorted((before.keys() | begun) - found.keys()) if not name.startswith(closed)]
    return Plan(todo, gone, same, failed)


def _steps(
    into: Store, folder: Path, todo: Iterable[tuple[Done, Path]], begun: set[str], embedder: Any, max_bytes: int
) -> Iterator[Ready | Done | Failure]:
    """What there is to write, file after file."""
    how = settings(into)
    for done, path in todo:
        known, seen = store.documents(into, done.file) if done.file in begun else {}, set()
        try:
            for document in _documents(folder, path, max_bytes):
                seen.add(document.source)
                digest = document_digest(document, how)
                if known.get(document.source) != digest:
                    passages = split(document, embedder.length, size=into.about.size, overlap=into.about.overlap)
                    yield Ready(done.file, document.source, digest, passages, document.source not in known)
        except ReadError as error:
            yield Failure(done.file, error.reason)
            continue
        for source in sorted(known.keys() - seen):
            yield Ready(done.file, source, "", [], new=False)
        yield done


def _documents(folder: Path, path: Path, max_bytes: int) -> Iterable[Document]:
    """The documents of a file, all of which was read without an error before the first is given away.

    A table may be larger than memory, so it is read twice.
    """
    found = readers.read(folder, path, max_bytes=max_bytes)
    try:
        if path.suffix.lower() not in readers.STREAMED:
            return list(found)
        deque(found, maxlen=0)
    except ReadError:
        raise
    except Exception as error:  # of a parser, whatever it may be: one odd file does not stop the others
        raise ReadError(path, f"cannot be read ({type(error).__name__}: {error})", "convert or leave it out") from error
    return readers.read(folder, path, max_bytes=max_bytes)


def document_digest(document: Document, how: str) -> str:
    """A digest of all that becomes of a document."""
    content = (how, document.title, document.text, document.sections, sorted(document.tags.items()))
    return hashlib.blake2b(repr(content).encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def _groups(steps: Iterable[Ready | Done | Failure]) -> Iterator[list[Ready | Done | Failure]]:
    """Steps together until they have GROUP passages."""
    group, passages = [], 0
    for step in steps:
        group.append(step)
        passages += len(step.passages) if isinstance(step, Ready) else 0
        if passages >= GROUP:
            yield group
            group, passages = [], 0
    if group:
        yield group


def _embed(ready: Iterable[Ready], embedder: Any) -> Iterator[np.ndarray]:
    """The vectors of all passages, some at a time; one empty part first, so that there is always one."""
    texts = [passage.text for one in ready for passage in one.passages]
    yield np.zeros((0, embedder.dim), np.float32)
    for at in range(0, len(texts), EMBEDDED):
        yield embedder.documents(texts[at : at + EMBEDDED])


def _write(into: Store, ready: list[Ready], vectors: np.ndarray) -> None:
    """Puts the passages of some documents in place, in one version."""
    if ready:
        sources = [one.source for one in ready]
        store.replace(into, _rows(ready, vectors), sources, new=all(one.new for one in ready))


def _rows(ready: list[Ready], vectors: np.ndarray) -> Any:
    """An Arrow table by `store.schema`."""
    arrow = need("pyarrow")
    pairs = [(one, number, passage) for one in ready for number, passage in enumerate(one.passages)]
    columns = {
        "id": [f"{one.source}:{number}" for one, number, _ in pairs],
        "text": [passage.text for *_, passage in pairs],
        "file": [one.file for one, *_ in pairs],
        "source": [one.source for one, *_ in pairs],
        "number": [number for _, number, _ in pairs],
        "title": [passage.title for *_, passage in pairs],
        "heading": [passage.heading for *_, passage in pairs],
        "start": [passage.start for *_, passage in pairs],
        "end": [passage.end for *_, passage in pairs],
        "page": [passage.page for *_, passage in pairs],
        "kind": [Path(one.file).suffix.lower().lstrip(".") for one, *_ in pairs],
        "tags": [[f"{key}={value}" for key, value in passage.tags.items()] for *_, passage in pairs],
        "digest": [one.digest for one, *_ in pairs],
    }
    flat = arrow.array(np.ascontiguousarray(vectors, np.float32).ravel())
    columns["vector"] = arrow.FixedSizeListArray.from_arrays(flat, vectors.shape[1])
    return arrow.table(columns, schema=store.schema(vectors.shape[1]))
