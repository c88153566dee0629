import random

import pytest

from jaxsft.data import DataError
from jaxsft.data.formats.preference import parse


def turns(*contents, first="user"):
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    return [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


def said(messages):
    return [message.content for message in messages]


def test_a_prompt_of_text_is_never_cut_out_of_the_answers():
    found = parse({"prompt": "a", "chosen": "a b", "rejected": "a c"})
    assert found[:3] == ("a", "a b", "a c")


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("The sky is blue.", "The sky is green.", "The sky is"),
        ("The sky is blue.", "The sky is blown.", "The sky is"),
        ("blue", "green", ""),
        ("sky", "skyline", ""),
        ("Q:  yes", "Q:  no", "Q:"),
        ("\n\nHuman: hi\n\nAssistant: yo", "\n\nHuman: hi\n\nAssistant: ho", "\n\nHuman: hi\n\nAssistant:"),
        ("你好 啊", "你好 呀", "你好"),
    ],
)
def test_an_implicit_prompt_of_text_is_the_whole_words_that_both_begin_with(chosen, rejected, prompt):
    found = parse({"chosen": chosen, "rejected": rejected})
    assert found[:3] == (prompt, chosen[len(prompt) :], rejected[len(prompt) :])


def test_an_implicit_prompt_and_an_answer_are_the_text_again():
    draw = random.Random(0)
    for _ in range(300):
        chosen, rejected = ("".join(draw.choices("ab \n", k=draw.randrange(9))) for _ in range(2))
        if chosen != rejected:
            found = parse({"chosen": chosen, "rejected": rejected})
            assert (found.prompt + found.chosen, found.prompt + found.rejected) == (chosen, rejected)
            assert not found.prompt[-1:].isspace()


def test_an_implicit_prompt_of_messages_is_the_turns_that_both_begin_with():
    found = parse({"chosen": turns("a", "b", "c", "good"), "rejected": turns("a", "b", "c", "bad")})
    assert (said(found.prompt), said(found.chosen), said(found.rejected)) == (["a", "b", "c"], ["good"], ["bad"])


@pytest.mark.parametrize("repeated", [True, False])
def test_answers_may_repeat_a_prompt_of_messages(repeated):
    whole = lambda answer: turns("a", answer) if repeated else turns(answer, first="assistant")
    found = parse({"prompt": turns("a"), "chosen": whole("good"), "rejected": whole("bad")})
    assert (said(found.prompt), said(found.chosen), said(found.rejected)) == (["a"], ["good"], ["bad"])


@pytest.mark.parametrize(("given", "margin"), [({}, 0.0), ({"margin": 2}, 2.0), ({"margin": 0.5}, 0.5)])
def test_a_margin_is_a_number_or_absent(given, margin):
    found = parse({"prompt": "a", "chosen": "b", "rejected": "c", "tools": [{"name": "add"}]} | given)
    assert (found.margin, type(found.margin)) == (margin, float)
    assert found.tools[0]["function"]["name"] == "add"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"chosen": "a", "rejected": "a"}, "chosen and rejected are the same; .* remove it"),
        ({"prompt": "a", "chosen": turns("b", first="assistant"), "rejected": "c"}, "columns mix text and messages"),
        ({"prompt": turns("a"), "chosen": "b", "rejected": "c"}, "prompt messages, chosen text, rejected text"),
        ({"chosen": "a", "rejected": "b", "margin": "1"}, "margin is '1'; expected a number"),
        ({"chosen": "a", "rejected": "b", "margin": True}, "margin is True; expected a number"),
        ({"chosen": 1, "rejected": "b"}, "chosen is 1; expected a list"),
        ({"chosen": turns("a", "b"), "rejected": turns("a")}, r"prompt \+ rejected has roles user; expected"),
        ({"chosen": turns("a", "b"), "rejected": turns("a", "c", "d")}, r"prompt \+ rejected has roles"),
    ],
)
def test_errors_say_what_was_expected(fields, message):
    with pytest.raises(DataError, match=message):
        parse(fields)
