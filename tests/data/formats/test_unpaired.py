import pytest

from jaxsft.data import DataError, Unpaired
from jaxsft.data.formats.unpaired import parse

ASK = {"role": "user", "content": "q"}
SAY = {"role": "assistant", "content": "a"}


@pytest.mark.parametrize("label", [True, False])
def test_text_is_kept_with_its_label(label):
    assert parse({"prompt": "q ", "completion": " a", "label": label}) == Unpaired("q ", " a", label)


def test_messages_are_read_as_turns():
    found = parse({"prompt": [ASK, SAY, ASK], "completion": [SAY], "label": False, "tools": [{"name": "add"}]})
    assert [turn.role for turn in found.prompt] == ["user", "assistant", "user"]
    assert [turn.content for turn in found.completion] == ["a"]
    assert (found.label, found.tools[0]["function"]["name"]) == (False, "add")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": "q", "completion": "a", "label": 1}, "label is 1; expected true or false"),
        ({"prompt": "q", "completion": "a", "label": "good"}, "label is 'good'; expected true or false"),
        ({"prompt": "q", "completion": [SAY], "label": True}, "columns mix text and messages"),
        ({"prompt": [ASK], "completion": [ASK], "label": True}, r"prompt \+ completion has roles user, user"),
        ({"prompt": 2, "completion": "a", "label": True}, "prompt is 2; expected a list"),
    ],
)
def test_errors_say_what_was_expected(fields, message):
    with pytest.raises(DataError, match=message):
        parse(fields)
