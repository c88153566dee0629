import pytest

from jaxsft.data import DataError
from jaxsft.data.formats.prompt import parse

ASK = {"role": "user", "content": "q"}
SAY = {"role": "assistant", "content": "a"}
CALL = {"role": "assistant", "tool_calls": [{"name": "add", "arguments": {}}]}
TOOL = {"role": "tool", "content": "3"}


def test_text_is_kept_and_other_columns_stay_with_it():
    found = parse({"prompt": " 1 + 1 =", "answer": 2, "tags": ["easy"]})
    assert (found.prompt, found.fields) == (" 1 + 1 =", {"answer": 2, "tags": ["easy"]})


@pytest.mark.parametrize("turns", [[ASK], [ASK, SAY, ASK], [ASK, CALL, TOOL]])
def test_messages_end_with_the_user_or_a_tool(turns):
    found = parse({"prompt": turns, "tools": [{"name": "add"}]})
    assert [turn.role for turn in found.prompt] == [turn["role"] for turn in turns]
    assert found.tools[0]["function"] == {"name": "add"}
    assert found.fields == {}


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([ASK, SAY], r"prompt has roles user, assistant; expected system \(optional\), user, ..., user"),
        ([{"role": "system", "content": "s"}], "prompt has roles system; expected"),
        ([], r"prompt is \[\]; expected a list"),
        (5, "prompt is 5; expected a list"),
    ],
)
def test_errors_say_what_was_expected(prompt, message):
    with pytest.raises(DataError, match=message):
        parse({"prompt": prompt})
