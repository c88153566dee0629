"""Rows of one source to documents on disk: parsed, written, tokenised and cut, in parallel, and kept by content.

What was tokenised once is not tokenised again: the folder's name is a digest of the rows' files, the tokenizer, its
template and every setting that matters, so a changed file or setting is another folder.
"""

import hashlib
import itertools
import json
import multiprocessing
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxsft.data import formats, pack, sources
from jaxsft.data.chat import Completion, Conversation, Image, Parsed, Passage, Preference, Prompt, Text, Unpaired
from jaxsft.data.info import Source, adapt
from jaxsft.data.render import Example, Rendered, encode
from jaxsft.data.rows import Bad, DataError, Row
from jaxsft.data.script import How, Script, scripts
from jaxsft.data.store import Documents, Piece, Writer, open_documents

VERSION = 3  # of what is written; another one is tokenised again
ROWS = 256  # that are tokenised at once
LISTED = 20  # bad rows that are told one by one
LARGE = 64 << 20  # bytes from which on several processes pay for their start

KINDS: dict[str, tuple[type, ...]] = {
    "learn": (Conversation, Completion, Text),
    "masked": (Text,),
    "preference": (Preference,),
    "unpaired": (Unpaired,),
    "prompt": (Prompt, Conversation, Completion),
}
NOUNS = {
    Conversation: "a conversation",
    Completion: "a completion",
    Text: "a text",
    Preference: "a preference",
    Unpaired: "an unpaired answer",
    Prompt: "a prompt",
    Image: "an image",
}
WORDS = {
    "learn": "conversations, completions and texts",
    "masked": "texts",
    "preference": "preferences, with chosen and rejected",
    "unpaired": "answers with a label",
    "prompt": "prompts, and conversations for their last question",
}


class Job(NamedTuple):
    """What is done to every row of a source."""

    source: Source
    kind: str  # of KINDS
    how: How
    max_length: int


class Result(NamedTuple):
    """What became of some rows."""

    piece: Piece
    formats: Counter
    bad: list[Bad]
    truncated: int
    longest: tuple[int, str]  # tokens before cutting, and the row's place


def tokenise_rows(found: Sequence[Row | Bad], job: Job, tokenizer: Any) -> Result:
    """Tokenises rows; what cannot be used comes back with its place and the reason.

    Example:
      >>> from jaxsft.data.vocabulary import doctest_tokenizer
      >>> job = Job(Source("x"), "learn", How(), 8)
      >>> tokenise_rows([Row({"text": "a b"}, "x line 1"), Row({"txt": "a"}, "x line 2")], job, doctest_tokenizer()).bad
      [Bad(place='x line 2', reason='columns txt fit no format: ...')]
    """
    bad: dict[int, Bad] = {}
    kept: list[tuple[int, str, Parsed, list[Script]]] = []
    for number, row in enumerate(found):
        if isinstance(row, Bad):
            bad[number] = row
            continue
        try:
            name, parsed = formats.parse(adapt(row.fields, job.source), job.source.format, row.folder)
            parsed = _fit(parsed, job.kind, name)
            kept.append((number, name, parsed, scripts(parsed, tokenizer, job.how)))
        except DataError as error:
            bad[number] = Bad(row.place, str(error))
    rendered = iter(encode([script for *_, written in kept for script in written], tokenizer, job.how))
    seen, truncated, longest, lines = Counter(), 0, (0, ""), []
    for number, name, parsed, written in kept:
        whole, place = [next(rendered) for _ in written], found[number].place
        try:
            cut = _cut(parsed, whole, job)
        except DataError as error:
            bad[number] = Bad(place, str(error))
            continue
        seen[name] += 1
        size = max(len(one.ids) for one in whole)
        longest = max(longest, (size, place))
        truncated += size > job.max_length and not isinstance(parsed, Text | Passage)
        lines.append((cut, _hash(whole), *_brings(parsed)))
    rows = [number for number, (cut, *_) in enumerate(lines) for _ in cut]
    columns = list(zip(*lines, strict=True)) or [(), (), (), ()]
    piece = Piece([example for cut in columns[0] for example in cut], rows, *columns[1:])
    return Result(piece, seen, [bad[number] for number in sorted(bad)], truncated, longest)


def _fit(parsed: Parsed, kind: str, name: str) -> Parsed:
    """The record a run needs, refused where the row is another; a conversation ends where its last answer begins."""
    if not isinstance(parsed, KINDS[kind]):
        raise DataError(f"the row holds {NOUNS[type(parsed)]} ({name}); this run takes {WORDS[kind]}")
    if kind == "masked" and isinstance(parsed, Text):
        return Passage(parsed.text)
    if kind != "prompt":
        return parsed
    match parsed:
        case Conversation(messages, tools, images):
            if images:
                raise DataError(
                    f"the row has {len(images)} images, which no language model here can see; remove the row"
                )
            return Prompt(messages[:-1], tools, {"answer": messages[-1].content})
        case Completion(prompt, completion):
            return Prompt(prompt, (), {"answer": completion})
    return parsed


def _cut(parsed: Parsed, whole: list[Rendered], job: Job) -> list[Example]:
    """The documents of a row, none longer than it may be."""
    (first, *rest), most = whole, job.max_length
    match parsed:
        case Text():
            return pack.chunks(Example(first.ids, first.mask), most)
        case Passage():
            if len(first.ids) < 3:
                raise DataError("the text is empty; remove the row")
            return pack.passages(Example(first.ids, first.mask), most)
        case Prompt():
            if len(first.ids) > most:
                raise DataError(f"the prompt has {len(first.ids)} tokens; raise data.max_length, which is {most}")
            return [Example(first.ids, first.mask)]
        case Preference():
            _expect_learned(first, rest[0])
            try:
                pair = pack.truncate_pair(first, rest[0], most)
            except ValueError as error:
                raise DataError(f"{error}; the chat template must write a prompt alike whatever follows it") from error
            _expect_left(first, pair)
            if np.array_equal(pair[0].ids, pair[1].ids):
                cut = len(pair[0].ids) < len(first.ids)
                remedy = f"raise data.max_length, which is {most}" if cut else "remove the row"
                raise DataError(f"chosen and rejected have the same tokens{' when cut' * cut}; {remedy}")
            return list(pair)
    _expect_learned(first)
    last = job.how.learn == "last"
    cut = pack.truncate(Example(first.ids, first.mask), most, answers=first.answers, last_first=last)
    _expect_left(first, (cut,))
    return [cut]


def _expect_learned(*whole: Rendered) -> None:
    if not all(one.mask.any() for one in whole):
        raise DataError("no token is learned: the answer is empty and the template has no stop token; remove the row")


def _expect_left(whole: Rendered, cut: Sequence[Example]) -> None:
    if not all(one.mask[1:].any() for one in cut):
        raise DataError(f"truncation of {len(whole.ids)} tokens leaves none that is learned; raise data.max_length")


def _hash(whole: Sequence[Rendered]) -> int:
    hasher = hashlib.blake2b(digest_size=8)
    for one in whole:
        hasher.update(np.int64(len(one.ids)).tobytes() + one.ids.tobytes() + one.mask.tobytes())
    return int.from_bytes(hasher.digest(), "little")


def _brings(parsed: Parsed) -> tuple[float, bytes]:
    """The number and the JSON that a row brings along."""
    match parsed:
        case Preference(margin=margin):
            return margin, b""
        case Unpaired(label=label):
            return float(label), b""
        case Prompt(fields=fields) if fields:
            return 0.0, json.dumps(fields, ensure_ascii=False, default=str).encode()
    return 0.0, b""


# ---- a whole source -------------------------------------------------------------------------------------------------


def tokenise(
    job: Job, tokenizer: Any, cache: Path, *, on_bad_row: str = "error", workers: int = 0, show: bool = False
) -> tuple[Documents, bool, str]:
    """Gives the documents of a source, from the cache if they are there.

    Args:
      job: the source and what is done to it.
      tokenizer: of transformers, fast, with a chat template.
      cache: the folder that takes a folder for each source and setting.
      on_bad_row: "error" ends with the first `LISTED` of them, "skip" leaves them out and counts them.
      workers: processes; 0 takes all cores where the files are large, 1 stays in this one.
      show: a progress line, for people.

    Returns:
      (documents, whether they were in the cache, the digest that names them).

    Raises:
      DataError: rows that cannot be used, listed by file and line.
    """
    name = key(job, tokenizer, on_bad_row)
    folder = cache / name
    if folder.is_dir():
        return open_documents(folder), True, name
    writer, seen, bad, truncated, longest = Writer(folder), Counter(), [], 0, (0, "")
    count = 0
    try:
        with _progress(job.source.path, show) as advance:
            for result in _results(job, tokenizer, workers):
                bad += result.bad[: LISTED - len(bad)] if len(bad) < LISTED else []
                count += len(result.bad)
                if bad and on_bad_row == "error" and len(bad) >= LISTED:
                    break
                writer.add(result.piece)
                seen += result.formats
                truncated += result.truncated
                longest = max(longest, result.longest)
                advance(len(result.piece.hashes))
        if bad and on_bad_row == "error":
            raise refuse(bad)
        if not writer.rows:
            more = f"; the first: {bad[0]}" if bad else ""
            raise DataError(f"{job.source.path} has no row that can be used, and {count} that cannot{more}")
    except BaseException:
        writer.drop()
        raise
    meta = {"source": job.source.path, "formats": dict(seen), "bad": [list(one) for one in bad], "dropped": count}
    meta |= {"truncated": truncated, "longest": list(longest), "documents": writer.documents, "rows": writer.rows}
    meta |= {"largest": writer.largest}
    return writer.finish(meta), False, name


def key(job: Job, tokenizer: Any, on_bad_row: str) -> str:
    """The digest of everything that decides what the documents are."""
    source = asdict(job.source) | {"weight": 1.0, "epochs": 1.0, "path": sources.digest(job.source.path)}
    described = {
        "version": VERSION,
        "source": source,
        "kind": job.kind,
        "how": job.how._asdict(),
        "max_length": job.max_length,
        "on_bad_row": on_bad_row,
        "tokenizer": hashlib.blake2b(tokenizer.backend_tokenizer.to_str().encode(), digest_size=16).hexdigest(),
        "template": tokenizer.chat_template,
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
    }
    return hashlib.blake2b(json.dumps(described, sort_keys=True).encode(), digest_size=16).hexdigest()


def refuse(bad: Sequence[Bad]) -> DataError:
    """What is said of rows that cannot be used, at most `LISTED` of them.

    Example:
      >>> refuse([Bad("a.jsonl line 1", "it is empty")])
      DataError('a.jsonl line 1: it is empty. Or leave it out with data.on_bad_row skip')
    """
    if len(bad) == 1:
        return DataError(f"{bad[0]}. Or leave it out with data.on_bad_row skip")
    listed = "\n  ".join(map(str, bad))
    more = " or more" if len(bad) == LISTED else ""
    return DataError(
        f"{len(bad)}{more} rows cannot be used:\n  {listed}\nMend them, or data.on_bad_row skip leaves them out"
    )


def _batches(source: Source) -> Iterator[list[Row | Bad]]:
    rows = itertools.islice(sources.scan(source.path), source.max_rows)
    while batch := list(itertools.islice(rows, ROWS)):
        yield batch


def _results(job: Job, tokenizer: Any, workers: int) -> Iterator[Result]:
    if workers == 0:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        size = sum(os.path.getsize(file) for file in sources.files(job.source.path))
        workers = cores if size > LARGE else 1
    if workers == 1:
        return (tokenise_rows(batch, job, tokenizer) for batch in _batches(job.source))
    return _in_parallel(_batches(job.source), job, tokenizer, workers)


def _in_parallel(batches: Iterable, job: Job, tokenizer: Any, workers: int) -> Iterator[Result]:
    """In order, with a few batches on their way, so that memory does not grow with the file."""
    # Spawned, since jax runs threads, which a fork would leave behind holding locks.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start_worker, (job, tokenizer)) as pool:
        waiting: deque = deque()
        try:
            for batch in batches:
                waiting.append(pool.submit(_work, batch))
                if len(waiting) > 3 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise DataError(
                "a process that tokenises has died, for want of memory most often; take fewer with data.workers. A "
                'script of your own must call this under `if __name__ == "__main__":`, since processes import it'
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


_JOB: list[Any] = []  # of a worker process, set once


def _start_worker(job: Job, tokenizer: Any) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each process has its core
    _JOB[:] = [job, tokenizer]


def _work(batch: Sequence[Row | Bad]) -> Result:
    return tokenise_rows(batch, *_JOB)


@contextmanager
def _progress(label: str, show: bool) -> Iterator[Callable[[int], None]]:
    """A line with the rows so far, gone when it ends; gives the function that counts more of them."""
    from rich.progress import Progress, TextColumn, TimeElapsedColumn

    text = "tokenising {task.description}: {task.completed:,.0f} rows"
    with Progress(TextColumn(text), TimeElapsedColumn(), transient=True, disable=not show) as bar:
        task = bar.add_task(Path(label).name, total=None)
        yield lambda rows: bar.advance(task, rows)


def describe(documents: Sequence[Documents]) -> Mapping[str, int]:
    """How many rows of each format several sources have.

    Example:
      >>> describe([])
      {}
    """
    return dict(sum((Counter(one.meta["formats"]) for one in documents), Counter()))
