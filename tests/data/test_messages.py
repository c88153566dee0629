import pytest

from jaxsft.data.messages import parse
from jaxsft.data.sources import DataError


def say(*roles):
    return {"messages": [{"role": role, "content": f"{i}"} for i, role in enumerate(roles)]}


@pytest.mark.parametrize(
    "roles",
    [("user", "assistant"), ("system", "user", "assistant"), ("user", "user", "assistant", "user", "assistant")],
)
def test_turns_come_in_order(roles):
    assert [tuple(turn) for turn in parse(say(*roles)).messages] == [(role, f"{i}") for i, role in enumerate(roles)]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (say("user"), "roles are user; expected system .optional., user, ..., assistant"),
        (say("assistant"), "roles are assistant; expected"),
        (say("system"), "roles are system; expected"),
        (say("user", "system", "assistant"), "roles are user, system, assistant; expected"),
        (say("user", "tool", "assistant"), "message 2 is .*expected a role of system, user, assistant"),
        ({"messages": [{"from": "human", "value": "hi"}]}, "message 1 is .*expected a role"),
        ({"messages": ["hi"]}, "message 1 is 'hi'; expected a role"),
        ({"messages": [{"role": "user", "content": None}]}, "message 1 has content None; expected a string"),
        ({"messages": []}, r"messages is \[\]; expected a list"),
        ({"messages": "hi"}, "messages is 'hi'; expected a list"),
    ],
)
def test_errors_say_what_was_expected(fields, message):
    with pytest.raises(DataError, match=message):
        parse(fields)
