"""TRL's trainers of preferences run here on a whole tiny model, for ours to be compared with."""

import math

import numpy as np
import pytest

from . import trl_preference

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
PAIRS = [
    {"prompt": "The sky is", "chosen": " blue today.", "rejected": " a green lamp, or so they said."},
    {"prompt": "Once upon a time there was", "chosen": " a girl who had a red ball.", "rejected": " no."},
    {"prompt": "Two and two", "chosen": " are four.", "rejected": " are five."},
]
JUDGED = [
    {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
    for row in PAIRS
    for side in ("chosen", "rejected")
]


@pytest.fixture(scope="module")
def folders(tiny):
    """A policy and another model for reference."""
    return tiny("llama", tokenizer=True, seed=0), tiny("llama", tokenizer=True, seed=1)


def finite_and_everywhere(step, names):
    assert math.isfinite(step.loss)
    assert all(math.isfinite(value) for value in step.metrics.values())
    for name in names:
        assert np.isfinite(step.gradients[name]).all(), name
        assert step.gradients[name].any(), name


LAYERS = [f"model.layers.{layer}.{name}.weight" for layer in range(4) for name in ("self_attn.q_proj", "mlp.down_proj")]


def test_dpo_starts_at_log_2_and_elsewhere_with_another_reference(folders):
    policy, reference = folders
    same, other = trl_preference.dpo(policy, PAIRS), trl_preference.dpo(policy, PAIRS, reference=reference, beta=0.3)
    assert same.loss == pytest.approx(math.log(2), abs=1e-6)
    assert abs(other.loss - math.log(2)) > 1e-2
    assert other.metrics["rewards/margins"] != 0
    for step in (same, other):
        finite_and_everywhere(step, [*LAYERS, "lm_head.weight", "model.embed_tokens.weight"])
        assert [row["prompt"] for row in step.rows] == [row["prompt"] for row in PAIRS]
        assert all(row["chosen_ids"] and row["rejected_ids"] and row["prompt_ids"] for row in step.rows)


def test_dpo_with_an_adapter_trains_the_adapter_alone(folders, tmp_path):
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    fresh = peft.get_peft_model(trl_preference.model(folders[0]), config)
    with torch.no_grad():
        for name, weight in fresh.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.3)
    fresh.save_pretrained(tmp_path)
    step = trl_preference.dpo(folders[0], PAIRS, adapter=tmp_path)
    written = {f"base_model.model.{name[:-7]}.lora_{part}.weight" for name in LAYERS for part in "AB"}
    assert step.gradients.keys() == written
    finite_and_everywhere(step, written)
    assert abs(step.loss - math.log(2)) > 1e-3  # B is not zero, and the reference is the base


@pytest.mark.parametrize("loss", ["kto", "apo_zero_unpaired"])
def test_kto_pairs_each_prompt_with_the_answer_of_the_row_before(folders, loss):
    policy, reference = folders
    step = trl_preference.kto(policy, JUDGED, reference=reference, loss_type=loss)
    finite_and_everywhere(step, LAYERS)
    assert [row["label"] for row in step.rows] == [True, False] * 3
    if loss == "kto":
        answers = [row["completion_ids"] for row in step.rows]
        assert [row["KL_completion_ids"] for row in step.rows] == [answers[-1], *answers[:-1]]


def test_losses_without_reference_run(folders):
    for step in (trl_preference.orpo(folders[0], PAIRS), trl_preference.cpo(folders[0], PAIRS, loss_type="simpo")):
        finite_and_everywhere(step, LAYERS)
        assert step.metrics["nll_loss"] > 0
        for row in step.rows:
            learned = [
                token for token, label in zip(row["chosen_input_ids"], row["chosen_labels"], strict=True) if label >= 0
            ]
            assert learned == [label for label in row["chosen_labels"] if label >= 0]
            assert 0 < len(learned) < len(row["chosen_input_ids"])


def test_a_reward_model_has_the_head_it_was_given(folders):
    head = np.random.default_rng(0).normal(scale=0.5, size=(1, 32)).astype(np.float32)
    rows = [row | {"margin": 0.5 * i} for i, row in enumerate(PAIRS)]
    step = trl_preference.reward(folders[0], rows, head=head, center_rewards_coefficient=0.01)
    finite_and_everywhere(step, [*LAYERS, "score.weight"])
    assert [row["margin"] for row in step.rows] == [0.0, 0.5, 1.0]
    doubled = trl_preference.reward(folders[0], rows, head=2 * head, center_rewards_coefficient=0.01)
    assert doubled.metrics["margin"] == pytest.approx(2 * step.metrics["margin"], rel=1e-4)
