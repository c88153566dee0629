"""Rewards, advantages and returns of packed episodes against loops over the episodes, in Python's float64."""

import math
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsft import rollouts
from jaxsft.objectives import Assessed, ppo

from . import rollouts as rl

DRAW = np.random.default_rng(5)
GIVEN = DRAW.normal(size=rl.EPISODES).astype(np.float32)
SILENT = np.arange(rl.EPISODES) % 5 == 2


def whitened(values: list[list[float]], keep_mean: bool = False) -> list[list[float]]:
    """Over all of them, with the unbiased variance."""
    every = [x for one in values for x in one]
    mean, deviation = statistics.mean(every), math.sqrt(statistics.variance(every) + 1e-8)
    return [[(x - mean) / deviation + mean * keep_mean for x in one] for one in values]


def by_hand(found: Assessed, rewards, heard, *, estimator, coef, gamma, lam, whiten_rewards, whiten_advantages):
    """(advantages, returns, kl) of each episode that is heard."""
    old, reference, values = (rl.lists(x) for x in found[:3])
    divergence = {
        "k1": lambda p, q: p - q,
        "k3": lambda p, q: math.exp(q - p) - (q - p) - 1,
    }[estimator]
    costs = [[divergence(p, q) for p, q in zip(old[n], reference[n], strict=True)] for n in heard]
    paid = [[-coef * x for x in cost] for cost in costs]
    for row, n in zip(paid, heard, strict=True):
        row[-1] += float(rewards[n])
    paid = whitened(paid, keep_mean=True) if whiten_rewards else paid
    advantages, returns = [], []
    for row, n in zip(paid, heard, strict=True):
        after, behind, own = 0.0, 0.0, []
        for reward, value in reversed(list(zip(row, values[n], strict=True))):
            after = reward + gamma * behind - value + gamma * lam * after
            behind = value
            own.insert(0, after)
        advantages.append(own)
        returns.append([a + v for a, v in zip(own, values[n], strict=True)])
    return whitened(advantages) if whiten_advantages else advantages, returns, costs


HOW = [
    {},
    {"kl_estimator": "k3", "gamma": 0.9, "lam": 0.5, "whiten_rewards": True},
    {"lam": 1.0, "whiten_advantages": False},
]


@pytest.mark.parametrize("how", HOW, ids=str)
def test_advantages_returns_and_metrics_are_those_of_a_loop_over_episodes(how, monkeypatch):
    found, coef, weight = rl.assessed(), 0.3, 0.7
    score = rl.scored(monkeypatch, ppo, found, **how, judge=rl.MODEL, judge_weight=weight)
    judged = score(GIVEN, SILENT, coef)
    heard = np.flatnonzero(~SILENT).tolist()
    said = [one[-1] for one in rl.lists(found.score)]
    rewards = [float(g) + weight * s for g, s in zip(GIVEN, said, strict=True)]
    np.testing.assert_allclose(judged.rewards, rewards, atol=1e-5)  # of all, before the divergence
    rule = {"kl_estimator": "k1", "gamma": 1.0, "lam": 0.95, "whiten_rewards": False, "whiten_advantages": True} | how
    kinds = {"estimator": rule.pop("kl_estimator"), "coef": coef}
    advantages, returns, costs = by_hand(found, rewards, heard, **kinds, **rule)
    ours, theirs = rl.lists(judged.rollouts.advantage), rl.lists(judged.rollouts.returns)
    for i, n in enumerate(heard):
        np.testing.assert_allclose(ours[n], advantages[i], atol=2e-5)
        np.testing.assert_allclose(theirs[n], returns[i], atol=2e-5)
    every = lambda values: [x for one in values for x in one]
    told = {name: float(value) for name, value in judged.metrics.items()}
    values = [rl.lists(found.value)[n] for n in heard]
    left = [r - v for r, v in zip(every(returns), every(values), strict=True)]
    wanted = {
        "kl": statistics.mean(every(costs)),
        "kl_answer": statistics.mean(map(sum, costs)),
        "value": statistics.mean(every(values)),
        "return": statistics.mean(every(returns)),
        "explained_variance": 1 - statistics.variance(left) / statistics.variance(every(returns)),
        "reward_model": statistics.mean(said[n] for n in heard),
    }
    assert set(told) == set(wanted)
    for name, value in wanted.items():
        assert told[name] == pytest.approx(value, abs=2e-5), name


def test_an_update_gets_what_was_assessed_and_silent_episodes_have_no_learned_token(monkeypatch):
    found = rl.assessed()
    made = rl.scored(monkeypatch, ppo, found)(np.where(SILENT, np.nan, GIVEN), SILENT, 0.1).rollouts
    tokens, episode = rl.drawn().packed
    quiet = np.append(SILENT, True)[episode]
    np.testing.assert_array_equal(made.mask, tokens.mask & ~quiet)
    for name in ("tokens", "positions", "segments"):
        np.testing.assert_array_equal(getattr(made, name), getattr(tokens, name))
    for name in ("old", "reference", "value"):
        np.testing.assert_array_equal(getattr(made, name), getattr(found, name))
    assert not np.asarray(made.fresh).any()
    for name in ("advantage", "returns"):
        values = np.asarray(getattr(made, name))
        assert np.isfinite(values).all()
        assert not values[quiet | ~rl.learned(tokens)].any()


def test_what_silent_episodes_say_changes_nothing(monkeypatch):
    """Of other tokens, values and rewards, also of none."""
    found, other = rl.assessed(), rl.assessed(1)
    _, episode = rl.drawn().packed
    quiet = np.append(SILENT, False)[episode]
    swapped = Assessed(*(np.where(quiet, b, a) for a, b in zip(found, other, strict=True)))
    how = {"whiten_rewards": True}
    one = rl.scored(monkeypatch, ppo, found, **how)(GIVEN, SILENT, 0.2)
    two = rl.scored(monkeypatch, ppo, swapped, **how)(np.where(SILENT, np.nan, GIVEN), SILENT, 0.2)
    for name in ("mask", "advantage", "returns"):
        np.testing.assert_array_equal(getattr(one.rollouts, name), getattr(two.rollouts, name))
    assert {k: float(v) for k, v in one.metrics.items()} == {k: float(v) for k, v in two.metrics.items()}
    heard = rl.scored(monkeypatch, ppo, found, **how)(GIVEN, None, 0.2)
    assert np.abs(heard.rollouts.advantage - one.rollouts.advantage).max() > 0.01  # and the check can fail


def test_the_reward_stands_at_the_last_drawn_token_which_may_be_the_one_that_ended_the_answer(monkeypatch):
    """With gamma 0 an advantage is the reward of a token less its value."""
    nothing = Assessed(*(np.zeros_like(x) for x in rl.assessed()))
    score = rl.scored(monkeypatch, ppo, nothing, gamma=0.0, lam=0.0, whiten_advantages=False)
    for n, paid in enumerate(rl.lists(score(1 + np.arange(rl.EPISODES)).rollouts.advantage)):
        assert paid == [0.0] * (len(rl.drawn().answers[n]) - 1) + [n + 1.0]


def test_divergence_costs_each_token_its_own_and_nothing_at_coefficient_0(monkeypatch):
    found = rl.assessed()._replace(value=np.zeros_like(rl.assessed().value))
    score = rl.scored(monkeypatch, ppo, found, gamma=0.0, lam=0.0, whiten_advantages=False)
    old, reference = rl.lists(found.old), rl.lists(found.reference)
    for n, paid in enumerate(rl.lists(score(np.zeros(rl.EPISODES), None, 0.4).rollouts.advantage)):
        np.testing.assert_allclose(paid, [0.4 * (q - p) for p, q in zip(old[n], reference[n], strict=True)], atol=1e-6)
    assert not np.asarray(score(np.zeros(rl.EPISODES)).rollouts.advantage).any()


def test_an_episode_of_four_tokens_by_hand(monkeypatch):
    """Prompt of two, four tokens drawn: log-probabilities below the reference's by 0.1, score 1, gamma 1, lambda 0.5.

    kl (k1)      -0.1            -0.1            -0.1            -0.1
    rewards       0.05            0.05            0.05            1.05       less half of that; the score at the end
    values        0.2             0.4             0.6             0.8
    errors        0.05+0.4-0.2    0.05+0.6-0.4    0.05+0.8-0.6    1.05-0.8   = 0.25 each
    advantages    0.46875         0.4375          0.375           0.25
    returns       0.66875         0.8375          0.975           1.05
    """
    tokens, episode = rollouts.pack([[5, 6]], [[7, 8, 9, 2]], length=8)
    row = lambda *x: jnp.array([[0.0, *x, 0.0, 0.0, 0.0]])
    found = Assessed(row(-1.1, -1.2, -1.3, -1.4), row(-1.0, -1.1, -1.2, -1.3), row(0.2, 0.4, 0.6, 0.8), row(0, 0, 0, 1))
    monkeypatch.setattr(ppo, "assess", lambda *args, **kwargs: found)
    score = ppo.scoring(rl.MODEL, lam=0.5, whiten_advantages=False, judge=rl.MODEL, judge_weight=1.0)
    judged = jax.jit(score)({}, tokens, episode, np.zeros(1, np.float32), np.zeros(1, bool), np.float32(0.5))
    close = lambda found, *wanted: np.testing.assert_allclose(found, [[0, *wanted, 0, 0, 0]], atol=1e-6)
    close(judged.rollouts.advantage, 0.46875, 0.4375, 0.375, 0.25)
    close(judged.rollouts.returns, 0.66875, 0.8375, 0.975, 1.05)
    assert float(judged.rewards[0]) == 1.0
    assert float(judged.metrics["kl_answer"]) == pytest.approx(-0.4, abs=1e-6)
