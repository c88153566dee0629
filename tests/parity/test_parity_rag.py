"""Retrieval as processes and on real questions: what a kill leaves, two writers at once, and how much is found."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxsft.rag import embed, index, measure, store
from jaxsft.rag.search import Searcher

from ..rag.hashing import Hashing, about, contents, write

pytestmark = pytest.mark.parity
ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data"
WORKER = """
import sys
from pathlib import Path
from jaxsft.rag import index, store
from tests.rag.hashing import Hashing, about

index.GROUP, index.EMBEDDED, index.TIDY = 6, 3, 4
uri, docs = sys.argv[1:]
with store.writing(uri):
    print("begun", flush=True)
    into = store.open(uri) if store.exists(uri) else store.create(uri, about())
    index.update(into, Path(docs), Hashing(), show=lambda state: print(state.passages, flush=True))
    print("done", flush=True)
    sys.stdin.read()
"""


def start(uri: Path, docs: Path) -> subprocess.Popen:
    command = [sys.executable, "-c", WORKER, str(uri), str(docs)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True, **pipes)


def kill(process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()


def corpus(version: int) -> dict[str, str]:
    """Documents of one to nine passages, and a table, all of which change with each version."""
    texts = {
        f"{n:03d}.txt": f"Document {n} of version {version}, sentence by sentence. " * (1 + 2 * n % 17)
        for n in range(60)
    }
    rows = "".join(json.dumps({"text": f"Row {n} of version {version // 2}."}) + "\n" for n in range(40))
    return texts | {"rows.jsonl": rows}


def test_killed_at_any_moment_every_document_is_whole_and_the_next_run_completes(tmp_path):
    uri, docs, draw = tmp_path / "store", tmp_path / "docs", random.Random(0)
    known: dict[str, list] = {}  # source -> the states that it may be in
    for version in range(6):
        write(docs, corpus(version))
        fresh = store.create(str(tmp_path / f"fresh{version}"), about())
        index.update(fresh, docs, Hashing())
        wanted = contents(fresh)
        for source in {row[0] for row in wanted}:
            known.setdefault(source, [[]]).append([row for row in wanted if row[0] == source])
        process = start(uri, docs)
        assert process.stdout.readline() == "begun\n"
        for _ in range(draw.randint(1, 120)):
            assert process.stdout.readline() not in ("", "done\n")
        time.sleep(draw.uniform(0.0, 0.05))
        kill(process)
        found = contents(store.open(str(uri)))
        assert found != wanted  # it was in the middle of it
        for source, states in known.items():
            assert [row for row in found if row[0] == source] in states, source
    with store.writing(str(uri)):  # the lock went with its process
        into = store.open(str(uri))
        index.update(into, docs, Hashing())
    assert contents(into) == wanted
    assert into.passages.index_stats(store.TEXT_INDEX).num_unindexed_rows == 0


def test_a_second_writer_is_refused_at_once_with_the_process_that_writes(tmp_path):
    docs = write(tmp_path / "docs", {"a.txt": "The lamp is red."})
    first = start(tmp_path / "store", docs)
    assert "done\n" in iter(first.stdout.readline, "")
    second = start(tmp_path / "store", docs)
    _, said = second.communicate(timeout=60)
    assert second.returncode == 1
    assert f"process {first.pid} is writing to {tmp_path / 'store'}; wait until it is done, or stop it" in said
    [hit] = Searcher(store.open(str(tmp_path / "store")), Hashing()).find("lamp")  # readers go on
    assert hit.passage.text == "The lamp is red."
    kill(first)
    third = start(tmp_path / "store", docs)
    assert "done\n" in iter(third.stdout.readline, "")
    kill(third)


def xquad(language: str) -> tuple[list[str], list[tuple[str, int]]]:
    """Paragraphs, and questions with the number of the paragraph that answers each."""
    articles = json.loads((DATA / "rag_xquad" / f"xquad.{language}.json").read_text(encoding="utf-8"))["data"]
    paragraphs = [paragraph for article in articles for paragraph in article["paragraphs"]]
    questions = [(one["question"], n) for n, paragraph in enumerate(paragraphs) for one in paragraph["qas"]]
    return [paragraph["context"] for paragraph in paragraphs], questions


def pubmedqa() -> tuple[list[str], list[tuple[str, int]]]:
    """Abstracts, and the question of each."""
    rows = json.loads((DATA / "rag_pubmedqa" / "pqal.json").read_text(encoding="utf-8")).values()
    return [" ".join(row["CONTEXTS"]) for row in rows], [(row["QUESTION"], n) for n, row in enumerate(rows)]


def recall(folder: Path, embedder: embed.Embedder, documents: list[str], questions: list[tuple[str, int]]):
    """{mode: {measure: mean}}: whether the right document is among the first 1 and 5, each document one passage."""
    made = store.create(str(folder / "store"), store.About("", embedder.digest, embedder.dim, 256, 0))
    how = index.settings(made)
    ready = [
        index.Ready(f"{n}.txt", f"{n}.txt", how, [index.Passage(text, f"{n}.txt")], True)
        for n, text in enumerate(documents)
    ]
    index._write(made, ready, embedder.documents(documents))
    store.tidy(made, index.VECTORS)
    asked, right = [question for question, _ in questions], {str(i): {f"{n}.txt"} for i, (_, n) in enumerate(questions)}
    figures = {}
    for mode in ("text", "dense", "hybrid"):
        hits = Searcher(made, embedder).find_all(asked, k=5, mode=mode)
        found = {str(i): [hit.passage.source for hit in some] for i, some in enumerate(hits)}
        values = measure.measure(found, right, ["R@1", "R@5"])
        figures[mode] = {name: measure.interval(list(of.values()))[0] for name, of in values.items()}
    return figures


@pytest.fixture(scope="module")
def minilm():
    return embed.load()


@pytest.mark.timeout(900)
@pytest.mark.skipif(not DATA.is_dir(), reason="needs the questions in shared/data")
@pytest.mark.parametrize(("corpus", "known"), [("xquad.en", 0.92), ("xquad.zh", 0.92), ("pubmedqa", 0.96)])
def test_both_together_find_no_less_than_words_alone(corpus, known, tmp_path, minilm, capsys):
    documents, questions = pubmedqa() if corpus == "pubmedqa" else xquad(corpus.removeprefix("xquad."))
    if corpus == "pubmedqa":  # all 700 take minutes
        documents, questions = documents[:200], questions[:200]
    figures = recall(tmp_path, minilm, documents, questions)
    with capsys.disabled():
        print(f"\n{corpus}: {figures}")
    text, hybrid = figures["text"], figures["hybrid"]
    assert text["R@1"] >= known
    assert hybrid["R@1"] >= text["R@1"]
    assert hybrid["R@5"] >= text["R@5"]
    if corpus == "xquad.zh":  # the embedder knows no Chinese, and must not spoil what words find
        assert figures["dense"]["R@1"] < 0.3
