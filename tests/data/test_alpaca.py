import pytest

from jaxsft.data.alpaca import parse
from jaxsft.data.sources import DataError


def test_the_question_is_instruction_and_input_on_their_own_lines():
    turns = parse({"instruction": "Add.", "input": "1 2", "output": "3"}).messages
    assert [tuple(turn) for turn in turns] == [("user", "Add.\n1 2"), ("assistant", "3")]


@pytest.mark.parametrize(("instruction", "given"), [("hi", ""), ("", "hi"), ("hi", None)])
def test_an_empty_part_leaves_no_newline(instruction, given):
    fields = {"instruction": instruction, "output": "yo"} | ({} if given is None else {"input": given})
    assert parse(fields).messages[0].content == "hi"


def test_system_and_history_come_before():
    fields = {"instruction": "c", "output": "d", "system": "s", "history": [["a", "b"]]}
    roles = ["system", "user", "assistant", "user", "assistant"]
    assert [tuple(turn) for turn in parse(fields).messages] == list(zip(roles, "sabcd", strict=True))


def test_empty_system_and_history_add_nothing():
    assert len(parse({"instruction": "a", "output": "b", "system": "", "history": []}).messages) == 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"instruction": "a", "output": 3}, "output is 3; expected a string"),
        ({"instruction": "a", "output": 0}, "output is 0; expected a string"),
        ({"instruction": ["a"], "output": "b"}, r"instruction is \['a'\]; expected a string"),
        ({"instruction": "", "input": "", "output": "b"}, "instruction and input are both"),
        (
            {"instruction": "a", "output": "b", "history": [["q"]]},
            r"history is .*expected \[\[question, answer\], ...\]",
        ),
        ({"instruction": "a", "output": "b", "history": "q"}, "history is 'q'"),
        ({"instruction": "a", "output": "b", "history": [["q", 1]]}, "all strings"),
    ],
)
def test_errors_say_what_was_expected(fields, message):
    with pytest.raises(DataError, match=message):
        parse(fields)
