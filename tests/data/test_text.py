import pytest

from jaxsft.data.sources import DataError
from jaxsft.data.text import parse


def test_a_text_is_taken_as_it_is():
    assert parse({"text": " a\n", "source": "x"}).text == " a\n"


def test_a_text_must_be_a_string():
    with pytest.raises(DataError, match="text is 3; expected a string"):
        parse({"text": 3})
