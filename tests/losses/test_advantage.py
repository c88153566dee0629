"""Advantages against plain loops in Python's float64."""

import math
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsft.losses import discounted, gae, group, last, leave_one_out, reinforce, whiten

NAN = float("nan")
# Rows of several episodes, of one that fills the row, of one token, and of none.
MASK = np.array([[1, 1, 1, 0, 1, 1, 0, 1], [1, 1, 1, 1, 1, 1, 1, 1], [0, 0, 1, 0, 0, 0, 0, 0], [0] * 8], bool)
close = lambda found, expected: np.testing.assert_allclose(found, expected, rtol=2e-6, atol=2e-6)


def drawn(seed=0):
    """Rewards and values, NaN and infinite where they do not count."""
    random = np.random.default_rng(seed)
    rewards, values = random.normal(size=(2, *MASK.shape)).astype(np.float32)
    return np.where(MASK, rewards, NAN), np.where(MASK, values, np.inf)


def episodes():
    """(row, positions of an episode) of MASK."""
    for row, counts in enumerate(MASK):
        begin = None
        for t in range(len(counts) + 1):
            here = t < len(counts) and counts[t]
            if here and begin is None:
                begin = t
            if not here and begin is not None:
                yield row, range(begin, t)
                begin = None


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.99, 0.0)])
def test_gae_is_the_sum_of_discounted_errors_of_each_episode(gamma, lam):
    rewards, values = drawn()
    advantages, returns = np.zeros(MASK.shape), np.zeros(MASK.shape)
    for row, positions in episodes():
        r, v = [[float(x[row, t]) for t in positions] for x in (rewards, values)]
        errors = [r[i] + gamma * (v[i + 1] if i + 1 < len(v) else 0.0) - v[i] for i in range(len(v))]
        for i, t in enumerate(positions):
            advantages[row, t] = sum((gamma * lam) ** (j - i) * errors[j] for j in range(i, len(v)))
            returns[row, t] = advantages[row, t] + v[i]
    found = gae(jnp.asarray(rewards), jnp.asarray(values), jnp.asarray(MASK), gamma=gamma, lam=lam)
    close(found[0], advantages)
    close(found[1], returns)
    assert all(x.dtype == jnp.float32 and not np.asarray(x)[~MASK].any() for x in found)


def test_an_episode_of_four_tokens_by_hand():
    """Score 1 at the end, 0.1 of KL on the way; gamma 1, lambda 0.5.

    errors      -0.1 + 0.6 - 0.5 = 0    -0.1 + 0.7 - 0.6 = 0    -0.1 + 0.8 - 0.7 = 0    0.9 - 0.8 = 0.1
    advantages  0.0125                  0.025                   0.05                    0.1
    """
    rewards, values = jnp.array([[-0.1, -0.1, -0.1, 0.9]]), jnp.array([[0.5, 0.6, 0.7, 0.8]])
    advantages, returns = gae(rewards, values, jnp.ones((1, 4), bool), lam=0.5)
    close(advantages, [[0.0125, 0.025, 0.05, 0.1]])
    close(returns, [[0.5125, 0.625, 0.75, 0.9]])


def test_with_lambda_1_the_returns_are_the_rewards_that_follow():
    rewards, values = drawn()
    returns = gae(jnp.asarray(rewards), jnp.asarray(values), jnp.asarray(MASK), gamma=0.9, lam=1.0)[1]
    close(returns, discounted(jnp.asarray(rewards), jnp.asarray(MASK), gamma=0.9))


def test_returns_to_go_are_discounted_sums_of_each_episode():
    rewards, _ = drawn()
    expected = np.zeros(MASK.shape)
    for row, positions in episodes():
        for t in positions:
            expected[row, t] = sum(0.8 ** (u - t) * float(rewards[row, u]) for u in positions if u >= t)
    close(discounted(jnp.asarray(rewards), jnp.asarray(MASK), gamma=0.8), expected)


def test_what_is_off_the_mask_has_no_gradient_and_makes_none_nan():
    rewards, values = map(jnp.asarray, drawn())
    mask = jnp.asarray(MASK)
    total = lambda rewards, values: sum((x**2).sum() for x in (*gae(rewards, values, mask), whiten(rewards, mask)))
    for slope in jax.jit(jax.grad(total, (0, 1)))(rewards, values):
        assert np.isfinite(slope).all()
        assert not np.asarray(slope)[~MASK].any()


@pytest.mark.parametrize("keep_mean", [False, True])
def test_whitening_has_one_mean_and_one_deviation_for_all_that_counts(keep_mean):
    rewards, _ = drawn()
    numbers = [float(x) for x in rewards[MASK]]
    mean, deviation = statistics.fmean(numbers), statistics.stdev(numbers)
    expected = np.where(MASK, (rewards - mean) / deviation + mean * keep_mean, 0.0)
    close(whiten(jnp.asarray(rewards), jnp.asarray(MASK), keep_mean=keep_mean), expected)


@pytest.mark.parametrize("count", [0, 1])
@pytest.mark.parametrize("keep_mean", [False, True])
def test_whitening_of_one_value_or_none_is_finite(count, keep_mean):
    mask = jnp.arange(3) < count
    found = whiten(jnp.array([5.0, NAN, NAN]), mask, keep_mean=keep_mean)
    assert found.tolist() == [5.0 if keep_mean and count else 0.0, 0.0, 0.0]


def test_reinforce_whitens_what_follows_a_token_and_a_score_on_the_last_reaches_all():
    mask = jnp.asarray(MASK)
    scores = jnp.where(last(mask), jnp.arange(32.0).reshape(4, 8), 0.0)
    numbers = np.zeros(MASK.shape)
    for row, positions in episodes():
        numbers[row, positions] = 8 * row + positions[-1]
    mean, deviation = statistics.fmean(numbers[MASK]), statistics.stdev(numbers[MASK])
    close(reinforce(scores, mask), np.where(MASK, (numbers - mean) / deviation, 0.0))


GROUPS = [[1.0, 0.0, 0.5, 2.0], [0.0, NAN, 1.0, 1.0], [NAN, NAN, 3.0, NAN], [0.1, 0.1, 0.1, 0.1], [NAN] * 4]


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_a_group_is_compared_with_its_own_mean_over_what_has_a_reward(scale):
    everything = [x for row in GROUPS for x in row if not math.isnan(x)]
    found = np.asarray(group(jnp.array(GROUPS), scale=scale))
    for row, here in zip(GROUPS, found, strict=True):
        known = [x for x in row if not math.isnan(x)]
        for x, advantage in zip(row, here, strict=True):
            if math.isnan(x) or len(known) < 2 or len(set(known)) == 1:
                assert advantage == 0  # exactly
                continue
            deviation = {"group": statistics.stdev(known), "batch": statistics.stdev(everything), "none": 0}[scale]
            divisor = 1 if scale == "none" else deviation + 1e-4
            assert advantage == pytest.approx((x - statistics.fmean(known)) / divisor, rel=1e-5)


def test_a_group_of_one_answer_says_nothing():
    assert group(jnp.array([[1.0], [2.0]])).tolist() == [[0.0], [0.0]]
    assert leave_one_out(jnp.array([[1.0], [2.0]])).tolist() == [[0.0], [0.0]]


def test_an_unknown_scale_raises():
    with pytest.raises(ValueError, match="scale is std; .* group, the batch, or none"):
        group(jnp.ones((2, 2)), scale="std")


def test_the_baseline_of_an_answer_is_the_mean_of_the_others():
    found = np.asarray(leave_one_out(jnp.array(GROUPS)))
    for row, here in zip(GROUPS, found, strict=True):
        for i, advantage in enumerate(here):
            others = [x for j, x in enumerate(row) if j != i and not math.isnan(x)]
            if math.isnan(row[i]) or not others or set(others) == {row[i]}:
                assert advantage == 0  # exactly
            else:
                assert advantage == pytest.approx(row[i] - statistics.fmean(others), rel=1e-6)


def test_normalised_baselines_have_deviation_1_over_what_has_one():
    plain, found = (np.asarray(leave_one_out(jnp.array(GROUPS), normalise=flag)) for flag in (False, True))
    several = [x for i in (0, 1, 3) for x, reward in zip(plain[i], GROUPS[i], strict=True) if not math.isnan(reward)]
    expected = (plain - statistics.fmean(several)) / (statistics.stdev(map(float, several)) + 1e-4)
    np.testing.assert_allclose(found, np.where(plain == 0, 0, expected), rtol=1e-5)
    assert not found[3].any()
