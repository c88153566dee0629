import json

import pytest

from jaxsft.data import DataError, Message, ToolCall
from jaxsft.data.formats.turns import ROLES, either, expect_order, read_calls, same_kind, show, string, tools, turns

ADD = {"name": "add", "arguments": {"a": 1}}


def one(**message):
    return turns([message], "messages")[0]


@pytest.mark.parametrize("role", [role for role in ROLES if role != "function_call"])
@pytest.mark.parametrize(("who", "what"), [("role", "content"), ("from", "value")])
def test_every_role_has_one_of_our_four_names(role, who, what):
    found = one(**{who: role, what: "x"})
    assert found == Message(ROLES[role], "x")
    assert found.role in ("system", "user", "assistant", "tool")


def test_typed_parts_are_joined_by_kind():
    parts = [
        {"type": "reasoning", "value": "hm"},
        {"type": "text", "text": "a"},
        {"type": "text", "value": "b"},
        {"type": "tool_call", "value": json.dumps(ADD)},
    ]
    assert one(role="assistant", content=parts) == Message("assistant", "ab", "hm", (ToolCall("add", {"a": 1}),))


@pytest.mark.parametrize(
    "found",
    [
        ADD,
        [ADD],
        json.dumps(ADD),
        json.dumps([ADD]),
        {"type": "function", "function": ADD},
        {"function": ADD | {"arguments": '{"a": 1}'}},
    ],
)
def test_a_call_is_read_in_every_form(found):
    assert read_calls(found, "message 1") == (ToolCall("add", {"a": 1}),)


@pytest.mark.parametrize("arguments", [None, "", {}, "{}"])
def test_a_call_may_have_no_arguments(arguments):
    assert read_calls({"name": "now", "arguments": arguments}, "message 1") == (ToolCall("now", {}),)


@pytest.mark.parametrize("found", [[{"name": "f"}], {"name": "f"}, '[{"name": "f"}]', [{"function": {"name": "f"}}]])
def test_tools_come_out_as_openai_writes_them(found):
    (tool,) = tools(found)
    assert tool["function"] == {"name": "f"}


@pytest.mark.parametrize("found", [None, "", "  ", [], "[]"])
def test_no_tools_are_none(found):
    assert tools(found) == ()


@pytest.mark.parametrize(
    ("message", "problem"),
    [
        ({"content": "x"}, "message 1 of messages has role None; expected one of system, developer, user"),
        ({"role": ["user"], "content": "x"}, r"has role \['user'\]"),
        ({"role": "user", "content": "x", "tool_calls": [ADD]}, "is of the user and has calls; only assistants do"),
        ({"role": "user", "content": "x", "reasoning": "r"}, "is of the user and has reasoning; only assistants do"),
        ({"role": "assistant", "content": "x", "reasoning": 3}, "has reasoning 3; expected a string"),
        ({"role": "assistant", "content": "x", "weight": 0.5}, "has weight 0.5; expected 0 or 1"),
        ({"role": "user", "content": [{"type": "image", "image": "a.jpg"}]}, "has the part .*expected a text"),
        ({"role": "user", "content": [{"type": ["text"]}]}, "has the part .*expected a text"),
        ({"role": "user", "content": ["x"]}, "has the part 'x'; expected a text"),
        ({"role": "assistant", "content": "", "tool_calls": [{}]}, r"calls \{\}; expected"),
        ({"role": "assistant", "content": "", "tool_calls": ["x"]}, "calls 'x'; expected"),
        ({"role": "function_call", "content": "add(1)"}, "is no JSON of a function call .*'add\\(1\\)'"),
        ({"role": "assistant", "tool_calls": [ADD | {"arguments": "a=1"}]}, "calls add with arguments that are no"),
        ({"role": "assistant", "tool_calls": [ADD | {"arguments": [1]}]}, r"calls add with \[1\]; expected an object"),
    ],
)
def test_a_turn_that_cannot_be_read_is_named(message, problem):
    with pytest.raises(DataError, match=problem):
        turns([message], "messages")


@pytest.mark.parametrize("found", ["add", [1], [{"function": "f"}], [{"parameters": {}}], 7, '[{"x": 1}]'])
def test_tools_without_a_name_are_refused(found):
    with pytest.raises(DataError, match="tools (is no JSON|has)"):
        tools(found)


@pytest.mark.parametrize("last", ["assistant", "user", ""])
@pytest.mark.parametrize("roles", ["ua", "uaua", "sua", "u", "su", "uua", "uaa", "au", "s", "usa", "utat", "ta"])
def test_order_agrees_with_a_pattern(roles, last):
    import re

    names = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    messages = tuple(Message(names[role], "x") for role in roles)
    for strict, pattern in ((True, "s?[ut](a[ut])*a?"), (False, "s?[ut][uta]*")):
        ends = roles.endswith(last[:1])
        if re.fullmatch(pattern, roles) and ends:
            assert expect_order(messages, "messages", strict=strict, last=last) == messages
        else:
            with pytest.raises(DataError, match="messages has roles"):
                expect_order(messages, "messages", strict=strict, last=last)


def test_columns_are_text_or_messages_and_long_values_are_cut():
    assert either({"a": "x"}, "a") == "x"
    assert same_kind({"a": "x", "b": "y"}, "a", "b") == ["x", "y"]
    assert string({}, "a") == ""
    with pytest.raises(DataError, match="a is None; expected a string"):
        string({"a": None}, "a")
    assert len(show("x" * 1000)) == 60
