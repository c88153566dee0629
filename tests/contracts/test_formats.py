"""What every registered data format keeps to."""

import json

import pytest

import jaxsft
from jaxsft import data, hub
from jaxsft.data import FORMATS
from jaxsft.data.render import encode
from jaxsft.data.script import scripts


def say(*contents):
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


END = "<|im_end|>"
# One row a format, and the words that are learned of it: of each of its texts.
ROWS = {
    "alpaca": ({"instruction": "Say", "input": "it", "output": "This. 是的"}, [f"This. 是的{END}"]),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"},
        [f"a{END}"],
    ),
    "preference": (
        {"prompt": say("q"), "chosen": say("", "+")[1:], "rejected": say("", "-")[1:]},
        [f"+{END}", f"-{END}"],
    ),
    "unpaired": ({"prompt": "The sky is", "completion": " green.", "label": False}, [f" green.{END}"]),
    "prompt_completion": ({"prompt": "The sky is", "completion": " blue."}, [f" blue.{END}"]),
    "messages": ({"messages": say("q", "a1", "w", "a2")}, [f"a1{END}a2{END}"]),
    "image": ({"image_path": "a.jpg", "label": "cat"}, None),
    "prompt": ({"prompt": say("q", "a", "w"), "answer": "b"}, [""]),
    "text": ({"text": "Once upon a time"}, [f"Once upon a time{END}"]),
}
LEARNED = ("alpaca", "sharegpt", "prompt_completion", "messages", "text")  # by data.load


@pytest.fixture(scope="module")
def tokenizer():
    return hub.load_tokenizer(jaxsft.BASE)


@pytest.fixture
def load(tmp_path, tokenizer):
    def load(row, **options):
        (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
        config = data.Config(
            train=str(tmp_path / "rows.jsonl"), max_length=64, cache=str(tmp_path / "cache"), **options
        )
        return data.load(config, tokenizer)

    return load


def test_every_format_has_an_example_here():
    assert ROWS.keys() == FORMATS.keys()


@pytest.mark.parametrize("name", FORMATS)
def test_a_row_is_told_by_its_columns_and_learns_what_it_should(name, tokenizer):
    fields, learned = ROWS[name]
    told, parsed = data.parse(fields)
    assert told == name
    if learned is None:
        with pytest.raises(data.DataError, match=f"{name} rows hold no text"):
            scripts(parsed, tokenizer)
        return
    found = encode(scripts(parsed, tokenizer), tokenizer)
    assert [tokenizer.decode(one.ids[one.mask]) for one in found] == learned
    assert all(one.ids[-1] == tokenizer.eos_token_id for one, words in zip(found, learned, strict=True) if words)


@pytest.mark.parametrize("format", ["auto", "its own"])
@pytest.mark.parametrize("name", FORMATS)
def test_a_run_takes_rows_that_it_can_learn_and_refuses_others_by_format(name, format, load, tokenizer):
    fields, learned = ROWS[name]
    format = name if format == "its own" else format
    if name not in LEARNED:
        with pytest.raises(
            data.DataError, match=f"rows.jsonl line 1: the row holds an? [a-z ]+ \\({name}\\); this run takes"
        ):
            load(fields, format=format)
        return
    rows, _, report = load(fields, format=format)
    row = rows[0]
    assert [tokenizer.decode(row.tokens[row.mask])] == learned
    assert report.trained_tokens == row.mask.sum()
    assert report.formats == {name: 1}
    assert row.tokens[row.mask][-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("name", FORMATS)
def test_a_missing_column_names_what_was_found(name, load):
    with pytest.raises(data.DataError, match=rf"rows.jsonl line 1: {name} rows need .* is not among foo, bar"):
        load({"foo": "x", "bar": "y"}, format=name)
