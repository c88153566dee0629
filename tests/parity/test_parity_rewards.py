"""Reward functions beside those of TRL 1.16, which are called as a user of TRL would name them."""

import pytest

from jaxsft import rewards

pytestmark = pytest.mark.parity

ANSWERS = [
    "<think>\n2 and 2\n</think>\n<answer>4</answer>",
    "<think>2 and 2</think><answer>4</answer>",
    "<think>2 and 2 <answer>4</answer>",
    "4",
]


def test_overlong_is_trls_soft_punishment():
    from trl.rewards import get_soft_overlong_punishment

    for limit, margin in ((100, 20), (64, 64), (50, 1)):
        theirs = get_soft_overlong_punishment(max_completion_len=limit, soft_punish_cache=margin)
        lengths = range(2 * limit)
        expected = theirs(completion_ids=[[1] * n for n in lengths])
        assert [rewards.overlong("", "", [1] * n, limit, margin) for n in lengths] == pytest.approx(expected)


def test_trls_own_functions_are_called_as_trl_calls_them():
    from trl.rewards import think_format_reward

    expected = think_format_reward([[{"role": "assistant", "content": answer}] for answer in ANSWERS])
    functions = {"trl.rewards:think_format_reward": {"messages": True}, "tags": 0.0}
    with rewards.load(functions, timeout=60) as judge:
        scored = judge(["2 + 2?"] * 4, ANSWERS, [{"completion_ids": [1, 2]}] * 4)
    assert scored.failures == []
    assert scored.total.tolist() == expected
    assert scored.parts["tags"].tolist() == expected == [1.0, 1.0, 0.0, 0.0]
