"""scripts/compare.py, with an embedder that needs no model and a model that knows nothing."""

import json

import pytest

from jaxsft.rag import answer, embed
from jaxsft.run import RunError

from ..rag.hashing import Hashing, write

ASKED = [
    {"question": "What colour is the lamp?", "answer": "The lamp is red.", "source": "lamp.md"},
    {"question": "What colour is the boat?", "answer": ["The boat is blue.", "Blue."], "source": "boat.csv"},
    {"question": "xyzzy?", "answer": answer.UNKNOWN, "source": ""},
]


@pytest.fixture
def town(monkeypatch, tmp_path):
    monkeypatch.setattr(embed, "load", lambda path="": Hashing())
    monkeypatch.chdir(tmp_path)
    write(tmp_path, {"docs/lamp.md": "The lamp is red.", "docs/boat.csv": "about\nThe boat is blue.\n"})
    write(tmp_path, {"later/lamp.md": "The lamp is green.", "later/boat.csv": "about\nThe boat is blue.\n"})
    later = [ASKED[0] | {"answer": "The lamp is green."}, *ASKED[1:]]
    for name, rows in (("asked", ASKED), ("asked_later", later)):
        write(tmp_path, {f"{name}.jsonl": "".join(json.dumps(row) + "\n" for row in rows)})
    return tmp_path


def test_four_ways_are_asked_before_and_after_the_change(town, small, run_here, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    run_here(
        "compare",
        *f"--base {small} --tuned {small} --docs docs --questions asked.jsonl".split(),
        *"--changed later --changed_questions asked_later.jsonl --k 1 --timed 0 --threshold 0.2".split(),
        *"--sample.max_new_tokens 4 --run.output_dir out".split(),
    )
    shown = capsys.readouterr().out
    assert "changed documents: 3 questions" in shown
    replies = [json.loads(line) for line in (town / "out" / "replies.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(replies) == 2 * 4 * 3
    for reply in replies:
        wanted = [reply["source"] + "#1" * reply["source"].endswith("csv")] if reply["source"] else []
        assert reply["passages"] == (wanted if "passages" in reply["way"] else [])
    unknown = [reply["answer"] for reply in replies if "passages" in reply["way"] and not reply["source"]]
    assert unknown == [answer.UNKNOWN] * 4  # nothing is near enough, and no model is asked
    ways = {way: [r["answer"] for r in replies if r["way"] == way] for way in ("base", "tuned")}
    assert ways["base"] == ways["tuned"]  # the same model
    html = (town / "out" / "compare.html").read_text(encoding="utf-8")
    assert "the search finds the right document" in html
    assert "1.00 [1.00, 1.00]" in html
    assert "The lamp is green." in html


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ("--docs docs --questions q", "--base is not given"),
        ("--base b --docs docs --questions q --changed later", "give both --changed and --changed_questions"),
    ],
)
def test_what_is_missing_is_told_before_anything_is_loaded(run_here, args, says):
    with pytest.raises(RunError, match=says):
        run_here("compare", *args.split())
