import pytest

from jaxsft.data import DataError, Preference, ToolCall, Unpaired
from jaxsft.data.formats.messages import parse


def say(*roles, **more):
    return {"messages": [{"role": role, "content": f"{i}"} for i, role in enumerate(roles)]} | more


@pytest.mark.parametrize(
    "roles",
    [
        ("user", "assistant"),
        ("system", "user", "assistant"),
        ("user", "user", "assistant", "user", "assistant"),
        ("user", "assistant", "tool", "tool", "assistant"),
        ("user", "assistant", "assistant"),
    ],
)
def test_turns_need_not_alternate(roles):
    found = parse(say(*roles)).messages
    assert [(turn.role, turn.content) for turn in found] == [(role, f"{i}") for i, role in enumerate(roles)]


def test_tool_calls_come_as_openai_writes_them():
    row = say("user", "assistant", "tool", "assistant")
    function = {"name": "add", "arguments": '{"a": 1, "b": 2}'}
    row["messages"][1] |= {"content": None, "tool_calls": [{"id": "1", "type": "function", "function": function}]}
    tool = {"type": "function", "function": {"name": "add", "parameters": {}}}
    found = parse(row | {"tools": [tool]})
    assert found.messages[1][1:4] == ("", "", (ToolCall("add", {"a": 1, "b": 2}),))
    assert found.tools == (tool,)


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_has_several_names(name):
    row = say("user", "assistant")
    row["messages"][1][name] = "hmm"
    assert parse(row).messages[1].reasoning == "hmm"


@pytest.mark.parametrize(("given", "learn"), [({"weight": 0}, False), ({"train": True}, True), ({"weight": 1}, True)])
def test_a_weight_says_whether_a_turn_is_learned(given, learn):
    row = say("user", "assistant", "user", "assistant")
    row["messages"][1] |= given
    assert [turn.learn for turn in parse(row).messages] == [True, learn, True, True]


def test_labels_and_pairs_are_read_as_of_sharegpt():
    sides = {side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    assert isinstance(parse(say("user", "assistant", label=False)), Unpaired)
    assert isinstance(parse(say("user", **sides)), Preference)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (say("user"), r"messages has roles user; expected system \(optional\), user, ..., assistant"),
        (say("assistant"), "has roles assistant; expected"),
        (say("system"), "has roles system; expected"),
        (say("user", "system", "assistant"), "has roles user, system, assistant; expected"),
        (say("user", "tool"), "has roles user, tool; expected"),
        (say("user", "critic", "assistant"), "message 2 of messages has role 'critic'; expected one of system, "),
        ({"messages": ["hi"]}, "message 1 of messages is 'hi'; expected an object with role and content"),
        ({"messages": [{"role": "user"}]}, "message 1 of messages has no content; expected a string"),
        ({"messages": [{"role": "user", "content": None}]}, "message 1 of messages has no content"),
        ({"messages": [{"role": "user", "content": 3}]}, "message 1 of messages has content 3; expected a string"),
        ({"messages": []}, r"messages is \[\]; expected a list"),
        ({"messages": "hi"}, "messages is 'hi'; expected a list"),
    ],
)
def test_errors_say_what_was_expected(fields, message):
    with pytest.raises(DataError, match=message):
        parse(fields)
