"""index and search of scripts/rag.py, with an embedder that needs no model."""

import threading
import time

import pytest

from jaxsft import config
from jaxsft.rag import embed, store, watch
from jaxsft.run import RunError

from ..rag.hashing import Hashing, contents, write
from .conftest import load_script


@pytest.fixture
def rag(monkeypatch, tmp_path, capsys):
    """rag("index", "--key", "value", ...) -> what it printed, wide enough for any table."""
    monkeypatch.setattr(embed, "load", lambda path="": Hashing())
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    script = load_script("rag")

    def call(*args: str) -> str:
        capsys.readouterr()
        script.main(config.commands(script.COMMANDS, list(args)))
        return capsys.readouterr().out

    return call


@pytest.fixture
def docs(tmp_path):
    texts = {"lamp.md": "# Lamps\n\nIntroduction.\n\n## Colour\n\nThe lamp is red.", "boat.txt": "The boat is blue."}
    return write(tmp_path / "docs", texts)


def test_a_folder_is_indexed_and_searched(rag, docs):
    shown = rag("index", "--docs", "docs", "--store", "st")
    assert "2 new, 0 changed, 0 gone, 0 as before" in shown
    assert store.open("st").about.size == 64  # as many as the embedder takes
    assert "0 new, 0 changed, 0 gone, 2 as before" in rag("index", "--docs", "docs", "--store", "st")
    shown = rag("search", "--store", "st", "--query", "What colour is the lamp?", "--k", "1")
    row = next(line for line in shown.splitlines() if "lamp.md" in line)
    rank, score, cosine, where, text = (cell.strip() for cell in row.strip("│ ").split("│"))
    assert (rank, where, text) == ("1", "lamp.md, Colour", "## Colour The lamp is red.")
    assert 0 < float(cosine) < 1
    assert float(score) == pytest.approx(2 / 61, abs=1e-3)  # the first by words and by meaning


def test_options_of_a_search(rag, docs):
    rag("index", "--docs", "docs", "--store", "st", "--size", "20", "--overlap", "3")
    assert (store.open("st").about.size, store.open("st").about.overlap) == (20, 3)
    shown = rag("search", "--store", "st", "--query", "lamp boat", "--where", "source=boat*", "--mode", "text")
    assert "boat.txt" in shown
    assert "lamp.md" not in shown
    two = '["kind=md", "heading!=Lamps"]'
    assert "Introduction" not in rag("search", "--store", "st", "--query", "lamp", "--where", two, "--diversity", "0.5")
    said = rag("search", "--store", "st", "--query", "lamp", "--where", "kind=pdf")
    assert said == "nothing was found where kind=pdf\n"


def test_another_size_cuts_anew_and_none_keeps_the_stores(rag, docs):
    rag("index", "--docs", "docs", "--store", "st")
    assert "2 changed" in rag("index", "--docs", "docs", "--store", "st", "--size", "4", "--overlap", "0")
    assert "2 as before" in rag("index", "--docs", "docs", "--store", "st")
    with pytest.raises(RunError, match=r"passages of 65 tokens that overlap by 0: hashing takes from 1 to 64 tokens"):
        rag("index", "--docs", "docs", "--store", "st", "--size", "65")


def test_a_file_that_cannot_be_read_makes_the_exit_status_one_and_the_others_are_in(rag, docs, capsys):
    (docs / "bad.txt").write_bytes(b"\0" * 9)
    with pytest.raises(SystemExit) as end:
        rag("index", "--docs", "docs", "--store", "st")
    assert end.value.code == 1
    shown = capsys.readouterr().out
    assert "bad.txt │ is no text, though it is named .txt" in shown
    assert len(contents(store.open("st"))) == 3


def test_what_is_missing_is_told(rag, docs):
    with pytest.raises(RunError, match=r"there is no folder 'dosc' with documents; give --docs"):
        rag("index", "--docs", "dosc", "--store", "st")
    with pytest.raises(RunError, match="there is no store at st; make one with"):
        rag("search", "--store", "st", "--query", "lamp")
    with pytest.raises(RunError, match="the query is empty"):
        rag("search", "--query", " ")
    (docs.parent / "empty").mkdir()
    assert "0 new" in rag("index", "--docs", "empty", "--store", "st")
    assert rag("search", "--store", "st", "--query", "lamp") == "nothing was found\n"


def test_a_watch_indexes_what_changes(rag, docs, monkeypatch):
    stop, real = threading.Event(), watch.changes
    monkeypatch.setattr(watch, "changes", lambda folder, **how: real(folder, **how, stop=stop))
    thread = threading.Thread(target=lambda: rag("index", "--docs", "docs", "--store", "st", "--watch", "true"))
    thread.start()
    try:
        _wait(lambda: store.exists("st") and len(store.settled(store.open("st"))) == 2)
        write(docs, {"new.txt": "Something new."})
        _wait(lambda: len(store.settled(store.open("st"))) == 3)
        (docs / "boat.txt").unlink()
        _wait(lambda: "boat.txt" not in store.settled(store.open("st")))
    finally:
        stop.set()
        thread.join(10)
    assert not thread.is_alive()


def _wait(until, seconds=20):
    end = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < end
        time.sleep(0.05)
