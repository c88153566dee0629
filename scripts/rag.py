"""Retrieval: index a folder of documents, search it, ask a model about it, and teach one to answer from it.

    python scripts/rag.py index --docs handbook --store runs/store
    python scripts/rag.py index --docs handbook --store runs/store --watch true
    python scripts/rag.py search --store runs/store --query "Who looks after the lamp?"
    python scripts/rag.py search --store runs/store --query lamp --mode text --where 'source=lamps/*' --k 10
    python scripts/rag.py search --store runs/store --query lamp --where '["kind=pdf", "lang!=en"]' --diversity 0.3
    python scripts/rag.py ask --store runs/store --model Qwen/Qwen3-0.6B --question "Who looks after the lamp?"
    python scripts/rag.py rows --store runs/store --questions questions.jsonl --out runs/rows.jsonl

`index` brings the store up to date: what is new or changed is read and embedded, what is gone is taken out. It may be
killed at any time and started again. A file that cannot be read is told at the end, and makes the exit status 1.

`ask` shows a model the passages that a search finds, as many as it has room for, and prints its answer as it comes, and
then what the numbers in it stand for. Where nothing is near enough to the question, it says so and asks no model.

`rows` writes prompts as `ask` writes them, with the answers, for scripts/sft.py.
"""

import sys
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxsft import config, hub, report, run, sections, talk, voice
from jaxsft.rag import embed, store, watch
from jaxsft.rag import index as indexing
from jaxsft.rag import rows as rowing
from jaxsft.rag import search as searching

SIZE, OVERLAP = 256, 32  # tokens of a passage where nothing else is said


@dataclass(frozen=True)
class Index:
    """Bring a store up to date with a folder of documents."""

    docs: str = ""
    """the folder of documents: txt, md, html, pdf, docx, csv, json, jsonl, in folders of any depth"""
    store: str = "runs/store"
    """the folder of the store, or a place like s3://bucket/store; it is made if there is none"""
    embedder: str = ""
    """a folder or hub name of a sentence encoder; by default the store's, or all-MiniLM-L6-v2"""
    watch: bool = False
    """go on: whenever something in the folder changes, bring the store up to date, until Ctrl-C"""
    size: int | None = None
    """tokens of a passage at most; by default the store's, or 256, or as many as the embedder takes; another size than
    before cuts all documents anew"""
    overlap: int | None = None
    """tokens that a passage repeats of the one before it; by default the store's, or 32"""
    max_mb: float = 100.0
    """the largest file to read, in 10^6 bytes; tables (csv, jsonl) may be larger, since they are read row by row"""


@dataclass(frozen=True)
class Search:
    """Search a store for the passages that answer a question."""

    store: str = "runs/store"
    """the store"""
    query: str = ""
    """the question, in any words"""
    embedder: str = ""
    """the encoder that the store was made with, where it lies elsewhere now"""
    k: int = 5
    """how many passages to show"""
    mode: Literal["hybrid", "dense", "text"] = "hybrid"
    """by words and meaning, by meaning alone, or by words alone"""
    where: list[str] | str = field(default_factory=list)
    """a filter or several, key=value or key!=value, with * for anything: source, title, heading, kind (the file's
    ending), page, or any tag of a document"""
    rerank: str = ""
    """a folder or hub name of a cross encoder that puts the best candidates in order"""
    diversity: float = 0.0
    """from 0 to 1, how much the passages are to differ from each other"""


@dataclass(frozen=True)
class Ask:
    """Ask a model a question about the documents of a store."""

    store: str = "runs/store"
    """the store"""
    model: str = ""
    """a folder with config.json and safetensors, or a hub name"""
    adapter: str = ""
    """an adapter folder in PEFT's format, to put on the model"""
    question: str = ""
    """the question"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """of weights and computation"""
    quantise: Literal["none", "int8", "nf4"] = "none"
    """keep the kernels of the layers packed, as for model.quantise"""
    template: str = ""
    """a chat template by name, or a .jinja file; by default the adapter's or the model's own"""
    passages: bool = False
    """show what the model is shown, too"""
    retrieval: talk.Config = talk.Config()
    sample: sections.Sample = sections.Sample()


@dataclass(frozen=True)
class Rows:
    """Write rows that teach a model to answer from passages."""

    store: str = "runs/store"
    """the store of the documents that the questions are about"""
    questions: str = ""
    """rows {"question", "answer", "source"}; the source is the file that has the answer"""
    out: str = ""
    """the file of rows to write, .jsonl"""
    passages: int = 3
    """shown at most; each row has from one to so many: the right one, and others that are found on the question"""
    unknown: float = 0.2
    """share of the rows without the right passage, whose answer is that the passages do not tell"""
    alone: bool = False
    """write questions and answers without any passages, to be learned by heart; no store is needed"""
    embedder: str = ""
    """the encoder that the store was made with, where it lies elsewhere now"""
    mode: Literal["hybrid", "dense", "text"] = "hybrid"
    """search by words and meaning, by meaning alone, or by words alone"""
    seed: int = 0
    """of the draws"""


COMMANDS = {"index": Index, "search": Search, "ask": Ask, "rows": Rows}


def encoder(path: str, made_with: str) -> Any:
    """The embedder that was asked for, or the one that a store was made with."""
    return embed.load(path or ("" if made_with == embed.DEFAULT else made_with))


def opened(cfg: Index) -> tuple[store.Store, Any]:
    """The store, made if there is none, and its embedder."""
    if store.exists(cfg.store):
        found = store.open(cfg.store)
        embedder = encoder(cfg.embedder, found.about.embedder)
        store.check(found, embedder)
        about = found.about
    else:
        embedder = encoder(cfg.embedder, embed.DEFAULT)
        size = min(SIZE, embedder.max_tokens)
        about = store.About(embedder.name, embedder.digest, embedder.dim, size, min(OVERLAP, size // 4))
        found = None
    wanted = replace(
        about,
        size=about.size if cfg.size is None else cfg.size,
        overlap=about.overlap if cfg.overlap is None else cfg.overlap,
    )
    if not 1 <= wanted.size <= embedder.max_tokens or not 0 <= wanted.overlap < wanted.size:
        raise run.RunError(
            f"passages of {wanted.size} tokens that overlap by {wanted.overlap}: {embedder.name} takes from 1 to "
            f"{embedder.max_tokens} tokens, and the overlap has to be less than the size; change --size or --overlap"
        )
    if found is None:
        return store.create(cfg.store, wanted), embedder
    return (found if wanted == about else store.describe(found, wanted)), embedder


@contextmanager
def bar():
    """Shows how far an update has come."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    figures = TextColumn("{task.fields[files]} files, {task.fields[passages]} passages, {task.fields[speed]}/s, left")
    with Progress(TextColumn("indexing"), BarColumn(), figures, TimeRemainingColumn(), TimeElapsedColumn()) as shown:
        task = shown.add_task("", total=None, files="0", passages="0", speed="-")

        def show(state: indexing.Progress) -> None:
            seconds = shown.tasks[0].elapsed or 0.0
            speed = f"{state.passages / seconds:,.0f}" if seconds else "-"
            fields = {"files": f"{state.files}/{state.of_files}", "passages": f"{state.passages:,}", "speed": speed}
            shown.update(task, completed=state.size, total=max(state.of_size, 1), **fields)  # type: ignore[arg-type]

        yield show


def tell(outcome: indexing.Outcome) -> None:
    files = f"{outcome.new} new, {outcome.changed} changed, {outcome.gone} gone, {outcome.same} as before"
    written = f"{outcome.passages:,} passages of {outcome.documents:,} documents"
    report.summary("indexed", {"files": files, "written": written, "not readable": len(outcome.failed)})
    if outcome.failed:
        report.table("files that could not be read", ("file", "reason"), outcome.failed, lines=False)


def index(cfg: Index) -> None:
    docs = Path(cfg.docs)
    if not cfg.docs or not docs.is_dir():
        raise run.RunError(f"there is no folder {cfg.docs!r} with documents; give --docs the folder to index")
    with store.writing(cfg.store):
        into, embedder = opened(cfg)

        def update() -> indexing.Outcome:
            with bar() as show:
                return indexing.update(into, docs, embedder, max_bytes=int(cfg.max_mb * 1e6), show=show)

        outcome = update()
        tell(outcome)
        if cfg.watch:
            print(f"watching {docs}; Ctrl-C ends it", flush=True)
            own = None if store.remote(cfg.store) else Path(cfg.store)
            try:
                for _ in watch.changes(docs, besides=own):
                    outcome = update()
                    if outcome.new or outcome.changed or outcome.gone or outcome.failed:
                        tell(outcome)
            except KeyboardInterrupt:  # in the middle of an update, which the next one completes
                pass
    if outcome.failed:
        sys.exit(1)


def search(cfg: Search) -> None:
    if not cfg.query.strip():
        raise run.RunError("the query is empty; give --query a question")
    conditions = [cfg.where] if isinstance(cfg.where, str) else cfg.where
    searcher = searching.load(cfg.store, embedder=cfg.embedder, rerank=cfg.rerank, mode=cfg.mode)
    hits = searcher.find(cfg.query, k=cfg.k, mode=cfg.mode, where=conditions, diversity=cfg.diversity)
    if not hits:
        print("nothing was found" + (f" where {' and '.join(conditions)}" if conditions else ""))
        return
    rows = []
    for rank, (passage, score, similarity) in enumerate(hits, 1):
        page = [] if passage.page is None else [f"p. {passage.page}"]
        place = ", ".join([passage.source, *page, *passage.heading.split(" > ")[-1:]])  # of the headings the nearest
        cosine = "" if similarity is None else f"{similarity:.3f}"
        rows.append((str(rank), f"{score:.3f}", cosine, place.removesuffix(", "), passage.text))
    report.table(f"{len(hits)} passages", ("", "score", "cosine", "where", "text"), rows)


def ask(cfg: Ask) -> None:
    if not cfg.question.strip():
        raise run.RunError("the question is empty; give --question one")
    find = talk.searcher(cfg.store, cfg.retrieval)
    model, base = hub.load_variables(cfg.model, quantise=cfg.quantise, dtype=jnp.dtype(cfg.dtype))
    how = {"adapter": cfg.adapter, "template": cfg.template, "strings": cfg.sample.stop}
    speaker = talk.Speaker(model, voice.load(cfg.model, model, base, **how), cfg.sample)
    key = jax.random.key(cfg.sample.seed)
    talk.reply(cfg.question, find, speaker, cfg.retrieval, key, passages=cfg.passages)


def rows(cfg: Rows) -> None:
    if not cfg.questions or not cfg.out:
        raise run.RunError("give --questions the rows with questions, and --out the file to write")
    if cfg.passages < 1 or not 0 <= cfg.unknown <= 1:
        given = f"passages is {cfg.passages} and unknown {cfg.unknown}"
        raise run.RunError(f"{given}; give at least 1 passage, and a share from 0 to 1")
    questions = rowing.read(cfg.questions)
    if cfg.alone:
        found = list(rowing.alone(questions))
    else:
        searcher = searching.load(cfg.store, embedder=cfg.embedder, mode=cfg.mode)
        mined = rowing.mine(questions, partial(searcher.find_all, mode=cfg.mode))
        found = list(rowing.build(mined, passages=cfg.passages, unknown=cfg.unknown, seed=cfg.seed))
    if not found:
        raise run.RunError(f"of none of the {len(questions):,} questions the source is in {cfg.store}")
    out = Path(cfg.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(rowing.lines(found), encoding="utf-8")
    missing = f"{len(questions) - len(found):,} questions, whose source is not in the store"
    report.summary("rows", {"written": f"{len(found):,} to {out}", "left out": missing})


RUN = {Index: index, Search: search, Ask: ask, Rows: rows}


def main(cfg: Index | Search | Ask | Rows) -> None:
    RUN[type(cfg)](cfg)


if __name__ == "__main__":
    run.guard(lambda: main(config.commands(COMMANDS)))
