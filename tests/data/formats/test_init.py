import random

import pytest

from jaxsft.data import FORMATS, DataError, Text, detect, parse

ASK = [{"role": "user", "content": "a"}]
SAY = [{"role": "assistant", "content": "b"}]
ROWS = {
    "alpaca": {"instruction": "a", "output": "b"},
    "sharegpt": {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    "preference": {"prompt": "a", "chosen": "b", "rejected": "c"},
    "unpaired": {"prompt": "a", "completion": "b", "label": True},
    "prompt_completion": {"prompt": ASK, "completion": SAY},
    "messages": {"messages": ASK + SAY},
    "image": {"image_path": "a.jpg", "label": "b"},
    "prompt": {"prompt": ASK, "answer": "b"},
    "text": {"text": "a"},
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_detected_and_parsed(name):
    assert detect(ROWS[name]) == name
    assert parse(ROWS[name]) == parse(ROWS[name], name) == (name, FORMATS[name].parse(ROWS[name]))


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_names_the_columns_it_misses(name):
    for column in FORMATS[name].columns:
        fields = {key: value for key, value in ROWS[name].items() if key not in column.split("|")} | {"other": "x"}
        told = column.replace("|", " or ")
        with pytest.raises(DataError, match=f"{name} rows need .*{told} is not among .*other"):
            parse(fields, name)


def test_a_row_of_no_format_is_told_what_each_needs():
    with pytest.raises(DataError, match=r"columns question, answer fit no format: alpaca needs instruction and ") as e:
        detect({"question": "a", "answer": "b"})
    assert all(f"{name} needs" in str(e.value) for name in FORMATS)
    with pytest.raises(DataError, match=r"columns \(none\) fit no format"):
        detect({})


@pytest.mark.parametrize(
    ("more", "name"),
    [
        (ROWS["alpaca"] | ROWS["text"], "alpaca"),
        (ROWS["alpaca"] | {"chosen": "b", "rejected": "c"}, "alpaca"),
        ({"instruction": "a", "chosen": "b", "rejected": "c"}, "alpaca"),
        (ROWS["sharegpt"] | {"chosen": SAY, "rejected": SAY}, "sharegpt"),
        (ROWS["messages"] | ROWS["text"], "messages"),
        (ROWS["messages"] | ROWS["prompt"], "messages"),
        (ROWS["messages"] | {"label": True}, "messages"),
        (ROWS["preference"] | {"label": True}, "preference"),
        (ROWS["prompt"] | ROWS["text"], "prompt"),
        ({"chosen": "a", "rejected": "b"}, "preference"),
    ],
)
def test_a_row_of_two_formats_is_told_by_their_order(more, name):
    assert detect(more) == name


def test_a_format_that_is_given_wins():
    assert parse(ROWS["alpaca"] | {"text": "a b"}, "text") == ("text", Text("a b"))


def test_an_unknown_format_is_told_the_known_ones():
    with pytest.raises(DataError, match=f"data.format is 'sharegtp'; there are auto, {', '.join(FORMATS)}"):
        parse(ROWS["alpaca"], "sharegtp")


def test_images_of_a_conversation_start_from_the_folder():
    assert parse(ROWS["messages"] | {"images": ["a.jpg", "/b.jpg"]}, folder="/data")[1].images == (
        "/data/a.jpg",
        "/b.jpg",
    )


def damage(value, draw):
    """A copy with one part, anywhere inside, replaced by something else."""
    junk = [None, True, 0, -1.5, "", "x", '{"name": 1}', [], ["x"], [[]], {}, {"type": ["text"]}, [{"role": "user"}]]
    if not isinstance(value, dict | list) or not value or draw.random() < 0.2:
        return draw.choice(junk)
    items = list(value.items() if isinstance(value, dict) else enumerate(value))
    at = draw.randrange(len(items))
    items[at] = items[at][0], damage(items[at][1], draw)
    return dict(items) if isinstance(value, dict) else [inner for _, inner in items]


CALL = {"role": "assistant", "content": [{"type": "text", "text": "a"}], "reasoning": "r", "weight": 1}
CALL |= {"tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}]}
RICH = {"tools": [{"function": {"name": "f"}}], "system": "s", "history": [["a", "b"]], "images": ["a.jpg"]}


@pytest.mark.parametrize("name", FORMATS)
def test_whatever_a_row_holds_it_is_read_or_refused_with_a_reason(name):
    draw = random.Random(name)
    whole = ROWS[name] | RICH | {"kto_tag": False, "margin": 1.0}
    whole |= {key: [*ASK, CALL, {"role": "tool", "content": "c"}, *SAY] for key in ("messages",) if key in whole}
    refused = 0
    for _ in range(1000):
        fields = damage(whole, draw)
        fields = fields if isinstance(fields, dict) else whole
        try:
            parse(fields, name)
        except DataError as error:
            refused += bool(str(error))
    assert 0 < refused < 1000 or name == "text"
