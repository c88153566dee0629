import pytest

from jaxsft.rewards import json_valid, tags


@pytest.mark.parametrize("text", ['{"a": 1}', " [1, 2]\n", "3", '"x"', "null"])
def test_json_alone_is_valid(text):
    assert json_valid("", text) == 1.0


@pytest.mark.parametrize(
    "text", ["", "{'a': 1}", '{"a": 1} thanks', "NaN", "[Infinity]", "[" * 100_000, "9" * 5000 + "x"]
)
def test_anything_else_is_not(text):
    assert json_valid("", text) == 0.0


def test_keys_are_those_of_an_object():
    assert json_valid("", '{"a": 1, "b": null}', keys=["a", "b"]) == 1.0
    assert json_valid("", '{"a": 1}', keys=["a", "b"]) == 0.0
    assert json_valid("", '["a"]', keys=["a"]) == 0.0
    assert json_valid("", '"a"', keys=["a"]) == 0.0


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("<think>a\nb</think>\n<answer>c</answer>", 1.0),
        ("  <think></think><answer></answer>\n", 1.0),
        ("<answer>c</answer><think>a</think>", 0.0),
        ("<think>a</think> so <answer>c</answer>", 0.0),
        ("<think>a</think><answer>c</answer> done", 0.0),
        ("<think>a<think>b</think></think><answer>c</answer>", 0.0),
        ("<think>a</think><answer>c</answer><answer>d</answer>", 0.0),
        ("<think>a</think><answer>c", 0.0),
    ],
)
def test_tags_stand_once_and_in_order(text, reward):
    assert tags("", text) == reward


def test_tags_may_have_other_names():
    assert tags("", "<plan>x</plan><code>y</code>", names=["plan", "code"]) == 1.0
    assert tags("", "<think>x</think><answer>y</answer>", names=["plan"]) == 0.0
