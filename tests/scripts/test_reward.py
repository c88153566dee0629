import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import jaxsft
from jaxsft import data, hub, score
from jaxsft.run import read_metrics

from .test_dpo import arguments, pairs  # noqa: F401


def given(model: str, rows: str, out: Path, **more) -> list[str]:
    found = arguments(model, rows, out, **more)
    for name in ("--preference.beta", "--sample.max_new_tokens"):
        at = found.index(name)
        del found[at : at + 2]
    return found


@pytest.fixture(scope="module")
def finished(run_here, small, pairs, tmp_path_factory) -> Path:  # noqa: F811
    out = tmp_path_factory.mktemp("reward") / "run"
    run_here("reward", *given(small, pairs, out, train__max_steps=8, reward__center=0.01))
    return out


def test_a_reward_model_learns_which_answer_is_better(finished):
    lines = read_metrics(finished / "metrics.jsonl")
    held = [line for line in lines if "eval_loss" in line]
    assert held[-1]["eval_loss"] < held[0]["eval_loss"]
    assert held[-1]["eval_accuracy"] > 0.9
    assert {"accuracy", "margin", "score", "score_chosen", "score_rejected"} <= set(lines[1])
    for name in ("loss.png", "metrics.png", "calibration.png"):
        assert (finished / name).read_bytes().startswith(b"\x89PNG")


def test_the_merged_folder_is_a_reward_model_with_the_scores_that_were_measured(finished, pairs):  # noqa: F811
    merged = finished / "merged"
    config = json.loads((merged / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert "lm_head.weight" not in load_file(merged / "model.safetensors")
    model, params = jaxsft.load(str(merged))
    tokenizer = hub.load_tokenizer(str(merged))
    held = data.load_pairs(data.Config(train=pairs, max_length=48), tokenizer, "preference").train
    both = [held.pair(number) for number in range(len(held.documents))]
    last = [line for line in read_metrics(finished / "metrics.jsonl") if "eval_loss" in line][-1]
    for name, side in (("chosen", 0), ("rejected", 1)):
        found = score.texts(model, {"params": params}, [pair[side].ids.tolist() for pair in both])
        assert float(np.mean(found)) == pytest.approx(last[f"eval_score_{name}"], abs=1e-4)
