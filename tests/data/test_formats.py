import pytest

from jaxsft.data import FORMATS, DataError, Text, detect, parse

ROWS = {
    "alpaca": {"instruction": "a", "output": "b"},
    "messages": {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    "text": {"text": "a"},
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_detected_and_parsed(name):
    assert detect(ROWS[name]) == name
    assert parse(ROWS[name]) == parse(ROWS[name], name) == FORMATS[name].parse(ROWS[name])


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_names_the_columns_it_misses(name):
    for column in FORMATS[name].columns:
        fields = {key: value for key, value in ROWS[name].items() if key != column} | {"other": "x"}
        with pytest.raises(DataError, match=f"{name} rows need .*{column} is not among .*other"):
            parse(fields, name)


def test_a_row_of_no_format_is_told_what_each_needs():
    with pytest.raises(
        DataError, match=r"columns question, answer fit no format: alpaca needs instruction and output; "
    ):
        detect({"question": "a", "answer": "b"})
    with pytest.raises(DataError, match=r"columns \(none\) fit no format"):
        detect({})


def test_instructions_win_over_a_text_column_beside_them():
    assert detect(ROWS["alpaca"] | {"text": "a b"}) == "alpaca"
    assert parse(ROWS["alpaca"] | {"text": "a b"}, "text") == Text("a b")


def test_an_unknown_format_is_told_the_known_ones():
    with pytest.raises(DataError, match="data.format is 'sharegpt'; there are auto, alpaca, messages, text"):
        parse(ROWS["alpaca"], "sharegpt")
