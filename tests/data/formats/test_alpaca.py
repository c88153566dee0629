import pytest

from jaxsft import data
from jaxsft.data import Conversation, DataError, Message, Preference, Unpaired
from jaxsft.data.formats.alpaca import parse

ASKED = {"instruction": "a"}


def said(messages):
    return [(message.role, message.content) for message in messages]


def test_the_question_is_instruction_and_input_on_their_own_lines():
    turns = parse({"instruction": "Add.", "input": "1 2", "output": "3"}).messages
    assert said(turns) == [("user", "Add.\n1 2"), ("assistant", "3")]


@pytest.mark.parametrize(("instruction", "given"), [("hi", ""), ("", "hi"), ("hi", None)])
def test_an_empty_part_leaves_no_newline(instruction, given):
    fields = {"instruction": instruction, "output": "yo"} | ({} if given is None else {"input": given})
    assert parse(fields).messages[0].content == "hi"


def test_system_and_history_come_before_and_history_is_learned():
    fields = {"instruction": "c", "output": "d", "system": "s", "history": [["a", "b"]]}
    roles = ["system", "user", "assistant", "user", "assistant"]
    found = parse(fields).messages
    assert said(found) == list(zip(roles, "sabcd", strict=True))
    assert all(message.learn for message in found)


@pytest.mark.parametrize("empty", [{"system": "", "history": []}, {"history": None}, {"tools": ""}, {"tools": []}])
def test_empty_columns_add_nothing(empty):
    row = {"instruction": "a", "output": "b"}
    assert parse(row | empty) == parse(row) == Conversation((Message("user", "a"), Message("assistant", "b")))


def test_tools_are_read_from_their_json():
    found = parse({"instruction": "a", "output": "b", "tools": '[{"name": "add"}]'})
    assert found.tools == ({"type": "function", "function": {"name": "add"}},)


def test_chosen_and_rejected_make_a_preference_in_place_of_output():
    found = parse(ASKED | {"system": "s", "chosen": "good", "rejected": "bad", "output": "?"})
    assert isinstance(found, Preference)
    assert said(found.prompt) == [("system", "s"), ("user", "a")]
    assert (said(found.chosen), said(found.rejected)) == ([("assistant", "good")], [("assistant", "bad")])


@pytest.mark.parametrize("label", [True, False])
def test_a_kto_tag_makes_an_unpaired_answer(label):
    found = parse(ASKED | {"output": "b", "kto_tag": label})
    assert found == Unpaired((Message("user", "a"),), (Message("assistant", "b"),), label)


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_half_a_preference_without_an_output_is_refused(side):
    other = {"chosen": "rejected", "rejected": "chosen"}[side]
    with pytest.raises(DataError, match=other):
        data.parse(ASKED | {side: "b"}, "alpaca")


@pytest.mark.parametrize("label", [1, "true", [True]])
def test_a_kto_tag_that_is_no_boolean_is_refused_and_not_learned_as_an_answer(label):
    with pytest.raises(DataError, match="kto_tag is .*expected true or false"):
        parse(ASKED | {"output": "b", "kto_tag": label})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"instruction": "a", "output": 3}, "output is 3; expected a string"),
        ({"instruction": "a", "output": 0}, "output is 0; expected a string"),
        ({"instruction": "a", "chosen": "b", "rejected": ["c"]}, r"rejected is \['c'\]; expected a string"),
        ({"instruction": "a", "output": "b", "system": 1}, "system is 1; expected a string"),
        ({"instruction": ["a"], "output": "b"}, r"instruction is \['a'\]; expected a string"),
        ({"instruction": "", "input": "", "output": "b"}, "instruction and input are both"),
        ({"instruction": "a", "output": "b", "tools": "add"}, "tools is no JSON"),
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
