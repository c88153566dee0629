"""The worked example of retrieval from its first command to its last, with two steps in the place of each training."""

import json
import runpy
from pathlib import Path

import pytest

import jaxsft
from jaxsft import config

from ..scripts.conftest import ROOT, load_script

pytestmark = pytest.mark.parity
TOWN = ROOT / "jaxsft" / "assets" / "harbour"


@pytest.fixture
def run(monkeypatch):
    """run("rag index", "--key", "value", ...) runs a script's main."""
    monkeypatch.chdir(ROOT)  # run files name what ships from here

    def run(name: str, *args: str) -> None:
        name, _, command = name.partition(" ")
        script = load_script(name)
        read = lambda: config.commands(script.COMMANDS, [command, *args]) if command else None
        script.main(read() or config.parse(script.Config, list(args)))

    return run


def test_the_shipped_files_are_those_that_the_script_writes(tmp_path, monkeypatch):
    written = runpy.run_path(str(TOWN / "make_documents.py"))
    monkeypatch.setitem(written["main"].__globals__, "HERE", tmp_path)
    monkeypatch.setattr("sys.argv", ["make_documents.py"])
    written["main"]()
    made = {file.relative_to(tmp_path): file.read_text(encoding="utf-8") for file in tmp_path.rglob("*.*")}
    assert len(made) == 30
    assert all((TOWN / name).read_text(encoding="utf-8") == text for name, text in made.items())


def test_lessons_tell_nothing_about_the_town(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["make_documents.py", "--lessons", str(tmp_path)])
    runpy.run_path(str(TOWN / "make_documents.py"), run_name="__main__")
    read = lambda file: [json.loads(line)["question"] for line in file.read_text(encoding="utf-8").splitlines()]
    lessons = read(tmp_path / "questions.jsonl")
    assert len(lessons) == 8396
    asked = [*read(TOWN / "questions.jsonl"), *read(TOWN / "questions_changed.jsonl"), *read(TOWN / "study.jsonl")]
    assert not set(lessons) & set(asked)


def test_documents_rows_training_comparison(run, tmp_path, capsys):
    store, out = str(tmp_path / "store"), {name: str(tmp_path / name) for name in ("reading.jsonl", "facts.jsonl")}
    short = {}
    for name in ("questions", "questions_changed", "study"):
        short[name] = tmp_path / f"{name}.jsonl"
        lines = (TOWN / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        short[name].write_text("\n".join(lines[:: len(lines) // 12]), encoding="utf-8")
    base = ["--embedder", str(jaxsft.BASE)]
    run("rag index", "--docs", str(TOWN / "documents"), "--store", store, *base, "--size", "96", "--overlap", "0")
    asked = ["--questions", str(short["study"])]
    run("rag rows", "--store", store, *asked, "--out", out["reading.jsonl"], "--mode", "text")
    run("rag rows", "--alone", "true", *asked, "--out", out["facts.jsonl"])
    two = ["--train.max_steps", "2", "--train.batch_size", "8", "--run.samples", "0"]  # the tests' mesh has 8 devices
    reader, tuned = tmp_path / "reader", tmp_path / "tuned"
    data = ["--data.train", out["reading.jsonl"], "--data.val_fraction", "0.2"]
    run("sft", "--config", "configs/harbour_reader.yaml", *data, "--run.output_dir", str(reader), *two)
    sources = json.dumps([out["facts.jsonl"], out["reading.jsonl"]])
    own = ["--model.path", str(reader / "merged"), "--data.train", sources, "--run.output_dir", str(tuned)]
    run("sft", "--config", "configs/harbour_tuned.yaml", *own, *two)
    given = {"base": reader / "merged", "tuned": tuned / "adapter", "run.output_dir": tmp_path / "out", "timed": 1}
    given |= {"questions": short["questions"], "changed_questions": short["questions_changed"]}
    given |= {"sample.max_new_tokens": 8}
    run("compare", "--config", "configs/compare.yaml", *(str(x) for k, v in given.items() for x in (f"--{k}", v)))
    replies = [json.loads(line) for line in Path(tmp_path / "out" / "replies.jsonl").read_text("utf-8").splitlines()]
    found = [reply["source"] in {name.split("#")[0] for name in reply["passages"]} for reply in replies if
             "passages" in reply["way"] and reply["source"]]  # fmt: skip
    assert sum(found) >= 0.9 * len(found)
    html = (tmp_path / "out" / "compare.html").read_text(encoding="utf-8")
    assert "2 steps" in html
    assert "what became of the answer" in html
