import json
import signal
from pathlib import Path

import jax
import pytest
from safetensors.numpy import load_file

from jaxsft import preflight, reinforce, sharding
from jaxsft.hosts import Stopped
from jaxsft.reinforce import SAMPLES
from jaxsft.run import RunError, read_metrics

REWARDS = """
def vowels(prompt, completion, **row):
    return sum(letter in "aeiou" for letter in completion) / (1 + len(completion))


def picky(prompt, completion, answer):
    if prompt.startswith("1"):
        raise KeyError(f"nothing is known of {prompt}")
    return float(len(completion) > int(answer))


def never(prompt, completion):
    raise ValueError("this one never works")
"""


@pytest.fixture(scope="module", autouse=True)
def alone():
    """One device of the eight, for which programs compile in half the time."""
    make = sharding.mesh
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "mesh", lambda *_, **__: make(1, 1, 1, devices=jax.devices()[:1]))
        yield


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    """A folder with questions to learn from, fewer to measure on, and reward functions."""
    folder = tmp_path_factory.mktemp("prompts")
    (folder / "mine.py").write_text(REWARDS)
    rows = [{"prompt": f"{a} and {b} is", "answer": str(a + b)} for a in range(5) for b in range(4)]
    for name, some in (("train", rows), ("eval", rows[::3])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    return folder


def arguments(model: str, prompts: Path, out: Path, function: str | None = "vowels", **more) -> list[str]:
    given = {
        "model.path": model,
        "data.train": prompts / "train.jsonl",
        "data.eval": prompts / "eval.jsonl",
        "data.max_length": 32,
        "tuning.lora.rank": 4,
        "rollout.max_new_tokens": 6,
        "optim.learning_rate": 0.01,
        "train.iterations": 4,
        "train.prompts": 7,
        "train.eval_every": 2,
        "train.save_every": 2,
        "run.output_dir": out,
        "run.samples": 2,
        "sample.max_new_tokens": 6,
        "sample.temperature": 1.0,
        "export.merged": "false",
    } | ({"reward.functions": f"{{{prompts / 'mine.py'}:{function}: 1.0}}"} if function else {})
    given |= {key.replace("__", "."): value for key, value in more.items()}
    return [part for key, value in given.items() for part in (f"--{key}", str(value))]


def untimed(file: Path) -> list[dict]:
    timed = lambda name: "seconds" in name or name.endswith("per_second")
    return [{key: value for key, value in row.items() if not timed(key)} for row in read_metrics(file)]


def same_as(finished: Path, other: Path) -> None:
    """A run that was interrupted ends bit by bit as one that was not."""
    assert untimed(other / "metrics.jsonl") == untimed(finished / "metrics.jsonl")
    assert (other / SAMPLES).read_bytes() == (finished / SAMPLES).read_bytes()
    weights = "adapter/adapter_model.safetensors"
    assert (other / weights).read_bytes() == (finished / weights).read_bytes()


PPO = {"train__epochs": 2, "train__minibatches": 2, "ppo__kl_target": 0.01, "ppo__kl_horizon": 50, "ppo__kl_coef": 0.2}


@pytest.fixture(scope="module")
def finished(run_here, small, prompts, tmp_path_factory) -> Path:
    """A run that nothing interrupted, with a coefficient that adapts."""
    out = tmp_path_factory.mktemp("finished") / "run"
    run_here("ppo", *arguments(small, prompts, out, **PPO))
    return out


def test_a_run_tells_all_that_it_should(finished):
    lines = read_metrics(finished / "metrics.jsonl")
    steps, held = ([line for line in lines if name in line] for name in ("loss", "eval_reward"))
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    assert [line["step"] for line in held] == [0, 2, 4]
    names = (
        "reward reward_spread length ended failures kl kl_answer value return explained_variance policy_loss entropy"
    )
    names += " ratio clip_fraction drift value_loss value_clip_fraction grad_norm trained_tokens updates kl_coef"
    names += " learning_rate rollout_tokens_per_second update_tokens_per_second"
    for line in steps:
        assert set(names.split()) <= set(line)
        assert line["updates"] == 4
        assert line["entropy"] >= 0
        assert line["reward"] == pytest.approx(next(v for k, v in line.items() if k.endswith("mine.py:vowels")))
    assert steps[0]["kl"] == steps[0]["kl_answer"] == steps[0]["value"] == 0  # a fresh adapter, and a fresh critic
    assert steps[-1]["kl"] != 0
    assert steps[0]["kl_coef"] == 0.2
    assert steps[1]["kl_coef"] == pytest.approx(0.2 * (1 - 0.2 * 7 / 50))  # no divergence at all, and less than wanted
    assert {"eval_reward", "eval_length", "eval_ended", "eval_failures"} <= set(held[0])
    for name in ("loss.png", "metrics.png"):
        assert (finished / name).read_bytes().startswith(b"\x89PNG")


def test_samples_are_all_held_out_answers_and_some_that_were_drawn(finished, prompts):
    rows = read_metrics(finished / SAMPLES)
    asked = [json.loads(line) for line in (prompts / "eval.jsonl").read_text().splitlines()]
    for step in (0, 2, 4):
        held = [row for row in rows if (row["step"], row["kind"]) == (step, "held out")]
        assert [row["wanted"] for row in held] == [row["answer"] for row in asked]
        assert all(row["prompt"].strip() == one["prompt"] for row, one in zip(held, asked, strict=True))
        told = [
            line for line in read_metrics(finished / "metrics.jsonl") if "eval_reward" in line and line["step"] == step
        ]
        assert sum(row["reward"] for row in held) / len(held) == pytest.approx(told[0]["eval_reward"], abs=1e-5)
    assert [row["step"] for row in rows if row["kind"] == "drawn"] == [2, 2, 4, 4]


def test_the_adapter_is_the_policy_s_and_the_base_is_untouched(finished, small):
    adapter = load_file(finished / "adapter" / "adapter_model.safetensors")
    assert all(".lora_A." in name or ".lora_B." in name for name in adapter)
    assert all(tensor.any() for tensor in adapter.values())


@pytest.mark.parity  # a long one
def test_a_run_that_was_told_to_end_and_goes_on_ends_bit_by_bit_as_one_that_was_not(
    finished, run_here, small, prompts, tmp_path, monkeypatch
):
    args, check = arguments(small, prompts, tmp_path / "run", **PPO), reinforce._check

    def interrupted(iteration, figures):
        check(iteration, figures)
        if iteration == 1:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(reinforce, "_check", interrupted)
    with pytest.raises(Stopped, match="stopped by SIGTERM after iteration 1; go on with --run.resume true"):
        run_here("ppo", *args)
    assert not (tmp_path / "run" / "adapter").exists()
    run_here("ppo", *args, "--run.resume", "true")
    same_as(finished, tmp_path / "run")


def test_what_cannot_be_is_refused_before_anything_is_drawn(run_here, small, prompts, tmp_path, capsys):
    with pytest.raises(RunError, match=r"train.row_length is 8, and an episode may have \d+ tokens; raise it"):
        run_here("ppo", *arguments(small, prompts, tmp_path / "a", train__row_length=8))
    with pytest.raises(RunError, match=r"with 4000 new ones that exceeds the model's \d+ positions"):
        run_here("ppo", *arguments(small, prompts, tmp_path / "b", rollout__max_new_tokens=4000))
    with pytest.raises(SystemExit):
        run_here("ppo", *arguments(small, prompts, tmp_path / "c", ppo__cliprange=0.2))
    assert "ppo.cliprange" in capsys.readouterr().err


@pytest.mark.parametrize("script", ["ppo", "grpo"])
def test_a_plan_reads_no_weights(script, run_here, small, prompts, tmp_path, capsys, monkeypatch):
    asked = []
    monkeypatch.setattr(preflight, "show", lambda work, sections, device_gb: asked.append((work, sections)))
    run_here(script, *arguments(small, prompts, tmp_path / "none", run__plan="true"))
    [(work, sections)] = asked
    assert (work.critic, work.reference, work.answers) == {"ppo": ("own", True, 7), "grpo": ("", False, 56)}[script]
    assert (sections.length, sections.train.batch_size) == (38, work.answers)
    assert not (tmp_path / "none").exists()
