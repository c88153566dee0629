"""What every registered data format keeps to."""

import json

import pytest

import jaxsft
from jaxsft import data, hub
from jaxsft.data import FORMATS

# One row a format, and the words that are learned of it.
ROWS = {
    "alpaca": ({"instruction": "Say", "input": "it", "output": "This. 是的"}, "This. 是的<|im_end|>"),
    "messages": (
        {
            "messages": [
                {"role": r, "content": c}
                for r, c in [("user", "q"), ("assistant", "a1"), ("user", "w"), ("assistant", "a2")]
            ]
        },
        "a1<|im_end|>a2<|im_end|>",
    ),
    "text": ({"text": "Once upon a time"}, "Once upon a time<|im_end|>"),
}


@pytest.fixture(scope="module")
def tokenizer():
    return hub.load_tokenizer(jaxsft.BASE)


def test_every_format_has_an_example_here():
    assert ROWS.keys() == FORMATS.keys()


@pytest.mark.parametrize("name", FORMATS)
def test_a_row_is_told_by_its_columns_and_learns_what_it_should(name, tokenizer, tmp_path):
    fields, learned = ROWS[name]
    assert data.detect(fields) == name
    (tmp_path / "rows.jsonl").write_text(json.dumps(fields) + "\n", encoding="utf-8")
    rows, report = data.load(str(tmp_path / "rows.jsonl"), tokenizer, format=name, max_length=64, packing=True)
    row = rows[0]
    assert tokenizer.decode(row.tokens[row.mask]) == learned
    assert report.trained_tokens == row.mask.sum()
    assert row.tokens[row.mask][-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("name", FORMATS)
def test_a_missing_column_names_what_was_found(name, tokenizer, tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"foo": "x", "bar": "y"}) + "\n", encoding="utf-8")
    with pytest.raises(data.DataError, match="rows.jsonl.*line 1.*foo, bar"):
        data.load(str(tmp_path / "rows.jsonl"), tokenizer, format=name, max_length=64, packing=True)
