import pytest

from jaxsft.data import DataError
from jaxsft.data.formats.text import parse


def test_a_text_is_taken_as_it_is():
    assert parse({"text": " a\n", "source": "x"}).text == " a\n"


@pytest.mark.parametrize("value", [3, ["a"], {"text": "a"}, True])
def test_a_text_must_be_a_string(value):
    with pytest.raises(DataError, match="text is .*; expected a string"):
        parse({"text": value})
