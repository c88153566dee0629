"""rows of scripts/rag.py: what is written is what scripts/sft.py reads."""

import json

import pytest

from jaxsft import config, data
from jaxsft.rag import answer, embed
from jaxsft.run import RunError

from ..rag.hashing import Hashing, build
from .conftest import load_script

TEXTS = {"lamp.md": "The lamp is red.", "boat.md": "The boat is blue.", "t.csv": "about\nThe lamp was lit.\n"}
ASKED = [
    {"question": "What colour is the lamp?", "answer": "The lamp is red.", "source": "lamp.md"},
    {"question": "What happened to the lamp?", "answer": "The lamp was lit.", "source": "t.csv"},
    {"question": "Who?", "answer": "Nobody.", "source": "gone.md"},
]


@pytest.fixture
def rows(monkeypatch, tmp_path, capsys):
    """rows("--key", "value", ...) -> (the rows that were written, what was printed)."""
    monkeypatch.setattr(embed, "load", lambda path="": Hashing())
    monkeypatch.setenv("COLUMNS", "200")
    build(tmp_path, TEXTS)
    file, out = tmp_path / "asked.jsonl", tmp_path / "new" / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ASKED), encoding="utf-8")
    script = load_script("rag")

    def call(*args: str):
        given = ["rows", "--store", str(tmp_path / "store"), "--questions", str(file), "--out", str(out), *args]
        script.main(config.commands(script.COMMANDS, given))
        return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()], capsys.readouterr().out

    return call


@pytest.mark.parametrize("mode", ["hybrid", "text"])
def test_questions_become_conversations_with_passages(rows, mode):
    found, shown = rows("--mode", mode, "--unknown", "0")
    assert [data.detect(row) for row in found] == ["messages"] * 2
    for row, asked in zip(found, ASKED, strict=False):
        prompt, said = (turn["content"] for turn in row["messages"])
        [number] = answer.cited(said)
        assert said == f"{asked['answer'][:-1]} [{number}]."
        assert f"({asked['source'].removesuffix('.csv')}" in prompt or f"[{number}] {asked['source']}" in prompt
        assert f"> {asked['answer']}" in prompt
    assert "1 questions, whose source is not in the store" in shown


def test_questions_alone_need_no_store(rows):
    found, _ = rows("--alone", "true", "--store", "nowhere")
    assert [[turn["content"] for turn in row["messages"]] for row in found] == [
        [row["question"], row["answer"]] for row in ASKED
    ]


def test_shares_and_counts_that_cannot_be_are_refused(rows):
    with pytest.raises(RunError, match=r"passages is 0 and unknown 0\.2; give at least 1 passage"):
        rows("--passages", "0")
