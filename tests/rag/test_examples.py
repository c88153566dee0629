import json

import pytest

from jaxsft.data import DataError
from jaxsft.rag import examples
from jaxsft.rag.examples import Example


@pytest.mark.parametrize(("fields", "expected"), [
    ({"query": "q", "positive": "p"}, Example("q", "p")),
    ({"anchor": "q", "positive": "p", "negative": "n"}, Example("q", "p", ("n",))),
    ({"question": "q", "positive": "p", "negatives": ["m", "n"]}, Example("q", "p", ("m", "n"))),
    ({"query": "q", "positive": "p", "negative_1": "m", "negative_2": "n"}, Example("q", "p", ("m", "n"))),
    ({"instruction": "q", "input": "", "output": "p"}, Example("q", "p")),
    ({"instruction": "q", "input": "more", "output": "p"}, Example("q\nmore", "p")),
])  # fmt: skip
def test_rows_of_every_kind_are_read(fields, expected):
    assert examples.parse(fields) == expected


@pytest.mark.parametrize(("fields", "message"), [
    ({"query": "q"}, "columns query; query .* and positive were expected"),
    ({"query": " ", "positive": "p"}, "query is ' '; a text was expected"),
    ({"query": "q", "positive": 3}, "positive is 3; a text"),
    ({"query": "q", "positive": "p", "negative": ["n", None]}, "negative is None; a text"),
])  # fmt: skip
def test_a_row_that_cannot_be_used_is_named_with_its_place(tmp_path, fields, message):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"query": "q", "positive": "p"}) + "\n" + json.dumps(fields) + "\n")
    with pytest.raises(DataError, match=rf"rows.jsonl line 2: {message}"):
        examples.read(str(file))


def test_a_corpus_is_a_column_of_text(tmp_path):
    file = tmp_path / "corpus.jsonl"
    file.write_text('{"text": "one"}\n{"text": "two"}\n')
    assert list(examples.texts(str(file))) == ["one", "two"]
    file.write_text('{"text": ""}\n')
    with pytest.raises(DataError, match="line 1: text is ''; a passage was expected"):
        list(examples.texts(str(file)))


def test_what_is_held_out_follows_the_seed_and_about_the_share():
    rows = [Example(f"q{i}", f"p{i // 3}") for i in range(900)]
    learned, held = examples.hold_out(rows, 0.2, seed=1)
    assert 0.13 < len(held) / len(rows) < 0.27
    assert {one.positive for one in held}.isdisjoint(one.positive for one in learned)
    assert examples.hold_out(rows, 0.2, seed=1) == (learned, held)
    assert examples.hold_out(rows, 0.2, seed=2)[1] != held
