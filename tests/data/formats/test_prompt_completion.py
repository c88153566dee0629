import pytest

from jaxsft.data import Completion, DataError
from jaxsft.data.formats.prompt_completion import parse

ASK = {"role": "user", "content": "q"}
SAY = {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(("prompt", "completion"), [("The sky is", " blue."), ("", "x"), ("\n", " \n")])
def test_text_is_kept_as_it_is(prompt, completion):
    assert parse({"prompt": prompt, "completion": completion}) == Completion(prompt, completion)


def test_only_answers_of_the_completion_are_learned():
    found = parse({"prompt": [ASK, SAY, ASK], "completion": [SAY, ASK, SAY]})
    assert [turn.role for turn in found.messages] == ["user", "assistant"] * 3
    assert [turn.learn for turn in found.messages if turn.role == "assistant"] == [False, True, True]


def test_system_and_tools_come_along():
    found = parse({"prompt": [ASK], "completion": [SAY], "system": "s", "tools": [{"name": "add"}]})
    assert found.messages[0][:2] == ("system", "s")
    assert found.tools[0]["function"]["name"] == "add"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": "q", "completion": [SAY]}, "columns mix text and messages: prompt text, completion messages"),
        ({"prompt": [ASK], "completion": "a"}, "prompt messages, completion text; write all of them one way"),
        ({"prompt": [ASK], "completion": [ASK]}, r"prompt \+ completion has roles user, user; expected"),
        ({"prompt": [SAY], "completion": [SAY]}, "has roles assistant, assistant; expected"),
        ({"prompt": 1, "completion": "a"}, "prompt is 1; expected a list"),
        ({"prompt": "q", "completion": []}, r"completion is \[\]; expected a list"),
    ],
)
def test_errors_say_what_was_expected(fields, message):
    with pytest.raises(DataError, match=message):
        parse(fields)
