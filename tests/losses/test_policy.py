"""Policy losses against plain loops over tokens and episodes in Python's float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsft.losses import POLICY, cispo, gspo, ppo, rloo, surrogate

from .test_episodes import LEARNED, SEGMENTS

close = lambda found, expected: np.testing.assert_allclose(found, expected, rtol=2e-6, atol=1e-7)
OPTIONS = {
    "ppo": {"low": 0.1, "high": 0.3},
    "cispo": {"cap": 1.2},
    "gspo": {"low": 0.05, "high": 0.1},
    "rloo": {"low": 0.1, "high": 0.3},
}


@pytest.fixture(scope="module")
def given():
    """logprobs, old, advantages, mask, segments; not finite off the mask. Advantages are those of episodes."""
    random = np.random.default_rng(0)
    old = -random.exponential(size=SEGMENTS.shape)
    now = old + random.normal(scale=0.3, size=SEGMENTS.shape)
    advantages = random.normal(size=(4, 4))[np.arange(4)[:, None], SEGMENTS]
    hidden = (jnp.asarray(np.where(LEARNED, x, np.nan), jnp.float32) for x in (now, old, advantages))
    return *hidden, jnp.asarray(LEARNED), jnp.asarray(SEGMENTS)


def ratios(name, given):
    """Of each learned token, by one loop over all others."""
    now, old = (np.asarray(x, np.float64) for x in given[:2])
    found = np.zeros(SEGMENTS.shape)
    for row, t in zip(*np.nonzero(LEARNED), strict=True):
        own = [u for u in range(8) if LEARNED[row, u] and SEGMENTS[row, u] == SEGMENTS[row, t]]
        if name in ("ppo", "cispo"):
            own = [t]
        total = sum(now[row, u] - old[row, u] for u in own)
        found[row, t] = math.exp(total / len(own) if name == "gspo" else total)
    return found


def formula(name, ratio, advantage, logprob):
    if name == "cispo":
        return -min(ratio, 1.2) * advantage * logprob
    low, high = 1 - OPTIONS[name]["low"], 1 + OPTIONS[name]["high"]
    return -min(ratio * advantage, min(max(ratio, low), high) * advantage)


def test_every_loss_has_a_formula_here():
    assert POLICY.keys() == OPTIONS.keys()


@pytest.mark.parametrize("name", POLICY)
def test_a_loss_is_its_formula_token_by_token(name, given):
    loss, clipped, ratio = jax.jit(lambda *x: POLICY[name](*x, **OPTIONS[name]))(*given)
    expected, bounded = ratios(name, given), np.zeros(SEGMENTS.shape, bool)
    close(ratio, expected)
    for row, t in zip(*np.nonzero(LEARNED), strict=True):
        rho, advantage, lp = expected[row, t], float(given[2][row, t]), float(given[0][row, t])
        assert float(loss[row, t]) == pytest.approx(formula(name, rho, advantage, lp), rel=1e-5)
        bounds = OPTIONS[name]
        high = rho > bounds.get("cap", 1 + bounds.get("high", 0))
        bounded[row, t] = high if advantage > 0 else rho < 1 - bounds.get("low", 1)
    assert bounded.any()
    assert (np.asarray(clipped) == bounded).all()


@pytest.mark.parametrize("name", ["ppo", "gspo", "rloo"])
def test_what_is_clipped_has_no_gradient(name, given):
    loss = lambda logprobs: POLICY[name](logprobs, *given[1:], **OPTIONS[name])
    slope = jax.jit(jax.grad(lambda x: loss(x).loss.sum()))(given[0])
    clipped = np.asarray(loss(given[0]).clipped)
    assert clipped.any()
    assert not np.asarray(slope)[clipped].any()
    assert (np.asarray(slope)[LEARNED & ~clipped] != 0).all()


def test_a_token_that_cispo_caps_still_learns(given):
    slope = jax.grad(lambda x: cispo(x, *given[1:], cap=1.2).loss.sum())(given[0])
    weight = np.minimum(ratios("cispo", given), 1.2)
    close(np.asarray(slope)[LEARNED], (-weight * np.asarray(given[2]))[LEARNED])


@pytest.mark.parametrize("name", POLICY)
def test_where_nothing_has_moved_the_gradient_is_that_of_reinforce(name, given):
    """-A lp, of cispo and ppo a token's, of gspo an episode's mean, of rloo an episode's sum at each of its tokens."""
    now, _, advantages, mask, segments = given
    slope = jax.grad(lambda x: POLICY[name](x, now, advantages, mask, segments, **OPTIONS[name]).loss.sum())(now)
    lengths = np.array([[LEARNED[i][SEGMENTS[i] == SEGMENTS[i, t]].sum() for t in range(8)] for i in range(4)])
    factor = lengths if name == "rloo" else 1
    close(np.asarray(slope)[LEARNED], (-np.asarray(advantages) * factor)[LEARNED])


def test_delta_bounds_the_loss_of_a_bad_token_whose_ratio_is_large_and_nothing_else():
    lp = jnp.log(jnp.array([[0.5, 1.0, 3.0, 9.0]]))
    loss = lambda lp, sign, **bounds: ppo(lp, 0 * lp, sign + 0 * lp, lp < 9, **bounds).loss
    close(loss(lp, -1.0, delta=4.0), [[0.8, 1.0, 3.0, 4.0]])
    np.testing.assert_array_equal(loss(lp, 1.0, delta=4.0), loss(lp, 1.0))
    slope = jax.grad(lambda lp: loss(lp, -1.0, delta=4.0).sum())(lp)
    close(slope, [[0.0, 1.0, 3.0, 0.0]])


@pytest.mark.parametrize("name", POLICY)
def test_a_surrogate_has_the_options_that_it_is_given(name, given):
    bounded, free = surrogate(name, **OPTIONS[name]), surrogate(name)
    np.testing.assert_array_equal(bounded(*given).loss, POLICY[name](*given, **OPTIONS[name]).loss)
    assert not np.array_equal(bounded(*given).loss, free(*given).loss)


def test_an_unknown_loss_or_option_raises():
    with pytest.raises(ValueError, match="no policy loss 'pgo'; there are ppo, cispo, gspo, rloo"):
        surrogate("pgo")
    with pytest.raises(ValueError, match="ppo takes no cap; there are low, high, delta"):
        surrogate("ppo", cap=2.0)


def test_an_episode_has_one_ratio_wherever_it_stands_in_a_row(given):
    """Each episode alone in a row gives what it gives among others."""
    for loss in (gspo, rloo):
        packed = loss(*given, low=0.05, high=0.1)
        alone = [jnp.where(jnp.asarray(SEGMENTS[:1] == 2), x[:1], jnp.nan) for x in given[:3]]
        here = jnp.asarray((SEGMENTS[:1] == 2) & LEARNED[:1])
        single = loss(*alone, here, jnp.asarray((SEGMENTS[:1] == 2).astype(int)), low=0.05, high=0.1)
        close(np.asarray(single.loss)[here], np.asarray(packed.loss)[:1][here])
