"""Advantages of every method against loops over groups, in Python's float64."""

import math
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsft import losses, objectives
from jaxsft.objectives import GRPO, METHODS, grpo

from . import rollouts as rl

SAMPLES = 3
NAN = float("nan")
# Of four groups: all differ, one has no reward, all are alike and their mean is rounded, a single one has a reward.
GIVEN = np.array([1.0, 0.0, 0.5, 2.0, NAN, 1.5, 0.1, 0.1, 0.1, NAN, 0.7, NAN], np.float32)
SILENT = np.isnan(GIVEN)
CHARGES = ("rloo", "reinforce++", "reinforce++_baseline")


def by_group(rewards: list[float], method: str, scale: str) -> list[float]:
    """The advantage of each answer; 0 for one without a reward, and for one that nothing can be compared with."""
    known = [[r for r in rewards[i : i + SAMPLES] if not math.isnan(r)] for i in range(0, len(rewards), SAMPLES)]
    every = [r for group in known for r in group]
    deviation = lambda group: statistics.stdev(group) if len(group) > 1 else 0.0
    found = []
    for i, reward in enumerate(rewards):
        group = known[i // SAMPLES]
        if math.isnan(reward) or len(set(group)) < 2:
            found.append(0.0)
        elif method == "rloo":
            found.append(reward - (sum(group) - reward) / (len(group) - 1))
        else:
            divisor = {"group": deviation(group) + 1e-4, "batch": deviation(every) + 1e-4, "none": 1.0}[scale]
            found.append((reward - statistics.mean(group)) / divisor)
    return found


def by_token(scores: list[float], costs: list[list[float]]) -> list[list[float]]:
    """Returns to go of each episode that is heard, whitened over all of their tokens; 0 for the others."""
    returns = {}
    for n in np.flatnonzero(~SILENT):
        paid = [-x for x in costs[n]]
        paid[-1] += scores[n]
        returns[n] = [sum(paid[t:]) for t in range(len(paid))]
    every = [x for one in returns.values() for x in one]
    mean, spread = statistics.mean(every), math.sqrt(statistics.variance(every) + 1e-8)
    return [
        [(x - mean) / spread for x in returns[n]] if n in returns else [0.0] * len(costs[n]) for n in range(len(costs))
    ]


@pytest.mark.parametrize(("method", "scale"), [*((m, None) for m in METHODS), ("grpo", "batch"), ("dapo", "none")])
def test_advantages_are_those_of_a_loop_over_groups(method, scale, monkeypatch):
    found, coef = rl.assessed(), 0.3
    score = rl.scored(monkeypatch, grpo, found, method=method, scale=scale, samples=SAMPLES, reference=True)
    judged = score(GIVEN, SILENT, coef)
    charges = method in CHARGES
    pairs = zip(rl.lists(found.old), rl.lists(found.reference), strict=True)
    costs = [[coef * (p - q) * charges for p, q in zip(*pair, strict=True)] for pair in pairs]
    rewards = [float(r) for r in GIVEN]
    wanted_scale = scale or ("none" if method in ("dr_grpo", "reinforce++_baseline") else "group")
    match method:
        case "reinforce++":
            wanted = by_token(rewards, costs)
        case "reinforce++_baseline":
            wanted = by_token(by_group(rewards, method, wanted_scale), costs)
        case _:
            if method == "rloo":
                rewards = [r - sum(cost) for r, cost in zip(rewards, costs, strict=True)]
            scores = by_group(rewards, method, wanted_scale)
            wanted = [[a] * len(cost) for a, cost in zip(scores, costs, strict=True)]
    for ours, theirs in zip(rl.lists(judged.rollouts.advantage), wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=3e-5)
    np.testing.assert_array_equal(judged.rewards, GIVEN)
    tokens, episode = rl.drawn().packed
    np.testing.assert_array_equal(judged.rollouts.mask, tokens.mask & ~np.append(SILENT, True)[episode])
    assert not np.asarray(judged.rollouts.returns).any()


def test_metrics_tell_of_groups_and_of_the_divergence_where_a_reference_runs(monkeypatch):
    found = rl.assessed()
    score = rl.scored(monkeypatch, grpo, found, samples=SAMPLES, reference=True, judge=rl.MODEL, judge_weight=0.5)
    told = {k: float(v) for k, v in score(np.nan_to_num(GIVEN), SILENT).metrics.items()}
    pairs = list(zip(rl.lists(found.old), rl.lists(found.reference), strict=True))
    k3 = lambda p, q: math.exp(q - p) - (q - p) - 1
    costs = [[k3(p, q) for p, q in zip(*pairs[n], strict=True)] for n in np.flatnonzero(~SILENT)]
    said = [one[-1] for one in rl.lists(found.score)]
    total = [float(r) + 0.5 * s for r, s in zip(np.nan_to_num(GIVEN), said, strict=True)]
    spreads = [statistics.pstdev(total[i : i + SAMPLES]) for i in range(0, len(total), SAMPLES)]
    assert told == pytest.approx(
        {
            "kl": statistics.mean(x for one in costs for x in one),
            "kl_answer": statistics.mean(map(sum, costs)),
            "reward_deviation": statistics.mean(spreads),
            "alike": 0.0,
            "reward_model": statistics.mean(said[n] for n in np.flatnonzero(~SILENT)),
        },
        abs=2e-5,
    )
    alone = rl.scored(monkeypatch, grpo, found, samples=SAMPLES)(GIVEN, SILENT).metrics
    assert set(alone) == {"reward_deviation", "alike"}
    assert float(alone["alike"]) == 0.5  # the third group and the last, of which one answer has a reward


def test_an_answer_that_is_not_learned_from_still_counts_in_its_group(monkeypatch):
    rewards, cut = np.arange(rl.EPISODES) % 4, np.arange(rl.EPISODES) % SAMPLES == 1
    score = rl.scored(monkeypatch, grpo, rl.assessed(), samples=SAMPLES)
    whole, masked = (rl.lists(score(rewards, silent).rollouts.advantage) for silent in (None, cut))
    for n in range(rl.EPISODES):
        assert masked[n] == ([0.0] * len(whole[n]) if cut[n] else whole[n])


@pytest.mark.parametrize("method", ["grpo", "dr_grpo", "cispo", "gspo", "rloo"])
def test_groups_without_variance_give_exactly_no_gradient(method, monkeypatch):
    """Whatever their answers' rewards are, and as long as nothing else does."""
    same = np.repeat(np.array([0.1, -2.7, 1 / 3, 0.7], np.float32), SAMPLES)
    made = rl.scored(monkeypatch, grpo, rl.assessed(), method=method, samples=SAMPLES)(same).rollouts
    assert not np.asarray(made.advantage).any()
    how = objectives.grpo_learning(GRPO(method=method), max_new_tokens=8)
    surrogate = losses.surrogate(how["loss"], **how["bounds"])
    mask = jnp.asarray(rl.learned(rl.drawn().packed.tokens))
    loss = lambda lp: surrogate(lp, made.old, made.advantage, mask, made.segments).loss.sum()
    assert not np.asarray(jax.grad(loss)(made.old + 0.3)).any()


def test_reinforce_plus_plus_needs_no_group_and_others_do(monkeypatch):
    assert rl.scored(monkeypatch, grpo, rl.assessed(), method="reinforce++", samples=1)(GIVEN, SILENT).rewards.shape
    for method in set(METHODS) - {"reinforce++"}:
        with pytest.raises(ValueError, match=r"compares answers to one prompt; train.samples is 1, give 2 or more"):
            grpo.scoring(rl.MODEL, method=method, samples=1)


def test_what_a_method_learns_is_as_its_paper_says():
    learn = lambda **given: objectives.grpo_learning(GRPO(**given), max_new_tokens=64, temperature=0.9)
    plain = learn(kl_coef=0.1, entropy_coef=0.01)
    assert plain == {
        "loss": "ppo", "bounds": {}, "aggregate": "sequence", "max_new_tokens": 64, "temperature": 0.9,
        "kl_coef": 0.1, "entropy_coef": 0.01,
    }  # fmt: skip
    assert learn(method="dapo", clip=0.2, clip_high=0.28, delta=3.0)["bounds"] == {
        "low": 0.2,
        "high": 0.28,
        "delta": 3.0,
    }
    assert learn(method="gspo", clip_high=0.28)["bounds"] == {"high": 0.28}
    assert learn(method="cispo", cap=3.0)["bounds"] == {"cap": 3.0}
    assert {m: (learn(method=m)["loss"], learn(method=m)["aggregate"]) for m in METHODS} == {
        "grpo": ("ppo", "sequence"), "dr_grpo": ("ppo", "fixed"), "dapo": ("ppo", "token"), "bnpo": ("ppo", "token"),
        "cispo": ("cispo", "token"), "gspo": ("gspo", "sequence"), "rloo": ("rloo", "sequence"),
        "reinforce++": ("ppo", "token"), "reinforce++_baseline": ("ppo", "token"),
    }  # fmt: skip
    for method in METHODS:  # what comes off the reward is not charged again
        assert learn(method=method, kl_coef=0.1)["kl_coef"] == (0.0 if method in CHARGES else 0.1)
        objectives.policy(rl.MODEL, **learn(method=method))


@pytest.mark.parametrize("bound", ["clip", "clip_high", "delta"])
def test_cispo_has_one_bound(bound):
    with pytest.raises(ValueError, match=r"grpo.method cispo has one bound, grpo.cap; leave clip, clip_high and delta"):
        objectives.grpo_learning(GRPO(method="cispo", **{bound: 0.2}), max_new_tokens=8)


def test_an_unknown_method_is_refused_with_those_that_are_known():
    with pytest.raises(ValueError, match=r"grpo.method 'grop' is not known; known are grpo, dr_grpo, .*reinforce\+\+"):
        objectives.grpo_learning(GRPO(method="grop"), max_new_tokens=8)
    with pytest.raises(ValueError, match="'grop' is not known"):
        grpo.scoring(rl.MODEL, method="grop", samples=4)


def test_a_divergence_is_told_where_there_is_a_reference_alone(monkeypatch):
    told = lambda reference: set(
        rl.scored(monkeypatch, grpo, rl.assessed(), samples=SAMPLES, reference=reference, judge=rl.MODEL)(GIVEN).metrics
    )
    assert told(True) - told(False) == {"kl", "kl_answer"}
    assert "reward_model" in told(False)
