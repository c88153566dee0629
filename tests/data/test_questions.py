import numpy as np
import pytest

import jaxsft
from jaxsft import data, hub
from jaxsft.data import Conversation, Example, Message, Text, in_memory, questions, render, render_text
from jaxsft.data.render import prompt_ids

from .test_render import talk

TALK = talk("hello\nworld", "good", "night", "bye", system="be kind")


@pytest.mark.parametrize("template", ["", "alpaca", "chatml", "plain", "vicuna", "mistral"])
def test_a_question_is_what_the_user_said_last_and_its_prompt_what_a_model_is_asked(template):
    tokenizer = data.with_template(hub.load_tokenizer(jaxsft.BASE), template)
    for conversation, asked, answer in (
        (talk("hello\nworld", "good"), "hello\nworld", "good"),
        (TALK, "night", "bye"),
    ):
        rows = in_memory([render(conversation, tokenizer)], 128)
        (found,) = questions(rows, tokenizer, 1)
        assert found.answer.strip() == answer
        assert found.ids == prompt_ids(conversation.messages[:-1], tokenizer)
        assert found.text.endswith(asked) or asked in found.text
        if template in ("", "chatml"):
            assert found.text == asked


def test_a_text_is_asked_to_go_on(chatml):
    example = render_text(Text("hello world " * 30), chatml)
    (found,) = questions(in_memory([example], 256), chatml, 1)
    assert found.text.startswith("hello world")
    assert found.answer.strip().startswith(("hello", "world", "lo", "wor"))
    assert found.ids == example.ids[:12].tolist()


def test_questions_are_spread_over_the_documents(chatml):
    rows = [render(Conversation((Message("user", f"{i}"), Message("assistant", "a"))), chatml) for i in range(9)]
    found = questions(in_memory([Example(np.asarray(i), np.asarray(m)) for i, m in rows], 64), chatml, 3)
    assert [one.text for one in found] == ["0", "4", "8"]
    assert questions(in_memory(rows, 64), chatml, 0) == []
