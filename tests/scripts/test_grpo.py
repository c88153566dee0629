import pytest

from jaxsft.reinforce import SAMPLES
from jaxsft.run import RunError, read_metrics

from .test_ppo import alone, arguments, prompts  # noqa: F401

GRPO = {"train__samples": 3, "train__iterations": 2, "train__prompts": 5, "grpo__kl_coef": 0.1}


@pytest.fixture(scope="module")
def finished(run_here, small, prompts, tmp_path_factory):  # noqa: F811
    """A run with a reward function that fails on some prompts, and answers that may be cut."""
    out = tmp_path_factory.mktemp("finished") / "run"
    more = GRPO | {"train__epochs": 2, "grpo__kl_stop": 1e-9, "sample__stop": '["e"]', "rollout__stop": '["e"]'}
    run_here("grpo", *arguments(small, prompts, out, "picky", **more))
    return out


def test_groups_are_compared_and_a_drifting_policy_ends_an_iteration(finished):
    steps = [line for line in read_metrics(finished / "metrics.jsonl") if "loss" in line]
    for line in steps:
        assert {"reward_deviation", "alike", "kl", "kl_answer", "kl_loss", "clip_fraction", "failures"} <= set(line)
        assert not {"value", "value_loss", "explained_variance"} & set(line)
        assert line["updates"] <= 2
    assert steps[0]["kl"] == 0
    assert steps[0]["updates"] == 2  # the first epoch moves it, the second one sees that


def test_a_reward_that_fails_is_told_with_its_prompt_and_teaches_nothing(finished):
    failed = [row for row in read_metrics(finished / SAMPLES) if row["kind"] == "failed"]
    assert failed
    for row in failed:
        assert row["prompt"].startswith("1")
        assert "KeyError" in row["error"]
        assert "nothing is known of 1" in row["error"]
        assert "mine.py line" in row["error"]
    lines = read_metrics(finished / "metrics.jsonl")
    for line in lines:
        count = sum(row["step"] == line["step"] for row in failed)
        assert line.get("failures", 0) <= count
    drawn = [row for row in read_metrics(finished / SAMPLES) if row["kind"] != "failed"]
    assert {row["reward"] is None for row in drawn if row["prompt"].startswith("1")} == {True}
    assert all(row["reward"] is not None for row in drawn if not row["prompt"].startswith("1"))


def test_a_reward_function_that_never_works_ends_the_run_and_says_why(run_here, small, prompts, tmp_path):  # noqa: F811
    with pytest.raises(
        RunError, match=r"never failed on all .* ValueError: this one never works .*\n.*prompt: \d and \d is"
    ):
        run_here("grpo", *arguments(small, prompts, tmp_path / "run", "never", **GRPO))


def test_one_answer_to_a_prompt_cannot_be_compared(run_here, small, prompts, tmp_path):  # noqa: F811
    with pytest.raises(ValueError, match=r"grpo compares answers to one prompt; train.samples is 1, give 2 or more"):
        run_here("grpo", *arguments(small, prompts, tmp_path / "run", **GRPO | {"train__samples": 1}))
