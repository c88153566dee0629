import json

import pytest

from jaxsft.data import Conversation, DataError, Preference, ToolCall, Unpaired
from jaxsft.data.formats.sharegpt import parse

OURS = {"human": "user", "gpt": "assistant", "observation": "tool", "system": "system"}


def talk(*roles, **more):
    return {"conversations": [{"from": role, "value": f"{i}"} for i, role in enumerate(roles)]} | more


@pytest.mark.parametrize(
    "roles",
    [
        ("human", "gpt"),
        ("system", "human", "gpt"),
        ("human", "gpt", "human", "gpt"),
        ("human", "gpt", "observation", "gpt"),
        ("observation", "gpt"),
    ],
)
def test_turns_keep_their_order_and_get_our_names(roles):
    found = parse(talk(*roles)).messages
    assert [(turn.role, turn.content) for turn in found] == [(OURS[role], f"{i}") for i, role in enumerate(roles)]


def test_a_system_column_opens_unless_the_turns_do():
    assert parse(talk("human", "gpt", system="be kind")).messages[0][:2] == ("system", "be kind")
    assert [turn.content for turn in parse(talk("system", "human", "gpt", system="no")).messages] == ["0", "1", "2"]


@pytest.mark.parametrize("count", [1, 2])
def test_a_function_call_is_an_assistant_with_calls_in_order(count):
    calls = [{"name": f"f{i}", "arguments": {"b": i, "a": [i]}} for i in range(count)]
    row = talk("human", "function_call", "observation", "gpt")
    row["conversations"][1]["value"] = json.dumps(calls if count > 1 else calls[0])
    found = parse(row | {"tools": json.dumps([{"name": "f0"}, {"name": "f1"}])})
    assert [turn.role for turn in found.messages] == ["user", "assistant", "tool", "assistant"]
    assert found.messages[1].calls == tuple(ToolCall(call["name"], call["arguments"]) for call in calls)
    assert list(found.messages[1].calls[0].arguments) == ["b", "a"]
    assert found.messages[1].content == ""
    assert [tool["function"]["name"] for tool in found.tools] == ["f0", "f1"]


def test_thought_before_a_function_call_is_reasoning():
    row = talk("human", "function_call", "observation", "gpt")
    row["conversations"][1]["value"] = '<think>\nhmm\n\nso\n</think>\n\n{"name": "f", "arguments": {}}'
    turn = parse(row).messages[1]
    assert (turn.reasoning, turn.calls) == ("hmm\n\nso", (ToolCall("f", {}),))


@pytest.mark.parametrize("wrap", [lambda turn: turn, lambda turn: [turn]])
def test_chosen_and_rejected_make_a_preference_of_the_last_turn(wrap):
    sides = {side: wrap({"from": "gpt", "value": side}) for side in ("chosen", "rejected")}
    found = parse(talk("system", "human", "gpt", "human", **sides))
    assert isinstance(found, Preference)
    assert [turn.content for turn in found.prompt] == ["0", "1", "2", "3"]
    assert [(turn.role, turn.content) for turn in found.chosen + found.rejected] == [
        ("assistant", "chosen"),
        ("assistant", "rejected"),
    ]


@pytest.mark.parametrize("column", ["kto_tag", "label"])
@pytest.mark.parametrize("label", [True, False])
def test_a_label_makes_the_last_turn_an_unpaired_answer(column, label):
    found = parse(talk("human", "gpt", "human", "gpt", **{column: label}))
    assert isinstance(found, Unpaired)
    assert [turn.content for turn in found.prompt] == ["0", "1", "2"]
    assert ([turn.content for turn in found.completion], found.label) == (["3"], label)


def test_images_stay_with_their_turns():
    assert parse(talk("human", "gpt", images=["a.jpg", "b.jpg"])).images == ("a.jpg", "b.jpg")
    assert parse(talk("human", "gpt", images="a.jpg")).images == ("a.jpg",)
    assert isinstance(parse(talk("human", "gpt", images=[])), Conversation)


SIDES = {"chosen": {"from": "gpt", "value": "a"}, "rejected": {"from": "gpt", "value": "b"}}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (talk("human"), r"conversations has roles user; expected system \(optional\), user, ..., assistant$"),
        (talk("gpt", "human"), "has roles assistant, user; expected"),
        (talk("human", "system", "gpt"), "has roles user, system, assistant; expected"),
        (talk("human", "human", "gpt"), "has roles user, user, assistant; expected .*, in turns"),
        (talk("human", "gpt", "gpt"), "expected .*, in turns"),
        (talk("system"), "has roles system; expected"),
        (talk("human", "bot"), "message 2 of conversations has role 'bot'; expected one of system, .*human"),
        (talk("human", "function_call"), "message 2 of conversations calls 1; expected"),
        ({"conversations": []}, r"conversations is \[\]; expected a list"),
        ({"conversations": "hi"}, "conversations is 'hi'; expected a list"),
        (talk("human", "gpt", **SIDES), "ends with the assistant, and chosen and rejected answer it"),
        (talk("human", **SIDES | {"chosen": {"from": "human", "value": "a"}}), "chosen is of the user; expected"),
        (talk("human", **SIDES | {"rejected": "b"}), "rejected is 'b'; expected a list"),
        (talk("human", "gpt", label="yes"), "label is 'yes'; expected true or false"),
        (talk("human", "gpt", images=3), "images is 3; expected"),
    ],
)
def test_errors_say_what_was_expected(fields, message):
    with pytest.raises(DataError, match=message):
        parse(fields)
