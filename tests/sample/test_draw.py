import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from jaxsft.sample import Draw, pick
from jaxsft.sample.draw import cut, inverse, threshold

SHARES = np.array([0.04, 0.3, 0.16, 0.22, 0.08, 0.2])
ROWS = 8000


choose = functools.partial(jax.jit, static_argnums=2)(pick)


def kept(shares, draw):
    """{token: probability} by a plain loop: sharpen, the k likeliest, the fewest that reach top_p, those of min_p."""
    weights = {token: share ** (1 / draw.temperature) for token, share in enumerate(shares)}
    ranked = sorted(weights, key=lambda token: -weights[token])
    ranked = ranked[: draw.top_k] if draw.top_k else ranked
    total, found, reached = sum(weights[token] for token in ranked), {}, 0.0
    for token in ranked:
        if reached >= draw.top_p:
            break
        found[token] = weights[token]
        reached += weights[token] / total
    found = {token: weight for token, weight in found.items() if weight >= draw.min_p * weights[ranked[0]]}
    return {token: weight / sum(found.values()) for token, weight in found.items()}


def frequencies(shares, draw, rows=ROWS, seed=1):
    scores = jnp.broadcast_to(jnp.log(jnp.asarray(shares)) + 3.0, (rows, len(shares)))
    tokens, logprobs = choose(scores, jax.random.split(jax.random.key(seed), rows), draw)
    return np.bincount(tokens, minlength=len(shares)), tokens, logprobs


CUTS = [Draw(1.0), Draw(1.5, 1), Draw(0.7, 3), Draw(1.0, 99), Draw(1.0, 0, 0.45), Draw(1.5, 0, 0.95), Draw(0.7, 4, 0.6)]
CUTS += [Draw(1.0, min_p=0.5), Draw(1.5, 5, 0.9, 0.25)]


@pytest.mark.parametrize("draw", CUTS, ids=str)
def test_tokens_are_drawn_from_the_kept_set_with_its_probabilities(draw):
    count, _, _ = frequencies(SHARES, draw)
    expected = kept(SHARES, draw)
    assert set(np.flatnonzero(count).tolist()) == set(expected)
    some = sorted(expected)
    assert len(some) == 1 or stats.chisquare(count[some], [ROWS * expected[i] for i in some]).pvalue > 1e-3


@pytest.mark.parametrize("draw", [Draw(1.3), Draw(0.9, 40, 0.8, 0.02)], ids=str)
def test_frequencies_of_a_larger_vocabulary_match_its_distribution(draw):
    shares = np.random.default_rng(0).dirichlet(np.full(101, 0.3))
    expected, rows = kept(shares, draw), 10_000
    count, _, _ = frequencies(shares, draw, rows)
    assert set(np.flatnonzero(count).tolist()) <= set(expected)
    often = sorted(token for token, share in expected.items() if rows * share >= 5)
    rest = rows - count[often].sum()
    shares_of = [rows * expected[i] for i in often]
    seldom = rows - sum(shares_of)
    counts = [*count[often], rest] if seldom > 1 else count[often]
    wanted = [*shares_of, seldom] if seldom > 1 else np.array(shares_of) * count[often].sum() / sum(shares_of)
    assert len(often) > 5
    assert stats.chisquare(counts, wanted).pvalue > 1e-3


def test_a_tokens_log_probability_is_that_of_the_whole_distribution_at_the_temperature():
    _, tokens, logprobs = frequencies(SHARES, Draw(0.7, 3, 0.9))
    sharper = SHARES ** (1 / 0.7) / np.sum(SHARES ** (1 / 0.7))
    np.testing.assert_allclose(logprobs, np.log(sharper)[np.asarray(tokens)], atol=1e-5)
    _, tokens, logprobs = frequencies(SHARES, Draw())
    np.testing.assert_allclose(logprobs, np.full(ROWS, np.log(0.3)), atol=1e-5)


def test_a_very_small_top_p_keeps_the_likeliest_token():
    for top_p in (0.0, 1e-6):
        assert np.flatnonzero(frequencies(SHARES, Draw(1.0, top_p=top_p))[0]).tolist() == [1]


def test_temperature_zero_takes_the_likeliest_of_each_row():
    scores = jnp.array([[0.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    assert pick(scores, jax.random.split(jax.random.key(0)), Draw(top_k=1, top_p=0.1))[0].tolist() == [1, 0]


def test_a_repetition_penalty_changes_the_choice_and_not_the_log_probability():
    scores, seen = jnp.array([[2.0, 1.5, -1.0]] * 2), jnp.array([[True, False, False], [False, False, True]])
    tokens, logprobs = pick(scores, jax.random.split(jax.random.key(0)), Draw(repetition_penalty=1.5), seen)
    assert tokens.tolist() == [1, 0]
    np.testing.assert_allclose(logprobs, jax.nn.log_softmax(scores[0])[jnp.array([1, 0])], rtol=1e-6)
    with pytest.raises(ValueError, match="repetition_penalty is 1.5; pick needs the tokens that were seen"):
        pick(scores, jax.random.split(jax.random.key(0)), Draw(repetition_penalty=1.5))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0, 1, width=32), min_size=12, max_size=12), st.integers(1, 12))
def test_a_threshold_is_the_kth_largest_value(values, k):
    found = threshold(jnp.array([values], jnp.float32), lambda kept: kept.sum(axis=-1) >= k)
    assert float(found[0, 0]) == sorted(values)[-k]


def test_equal_shares_stay_or_go_together():
    level = jnp.log(jnp.array([[0.3, 0.2, 0.2, 0.2, 0.1]]))
    assert (cut(level, Draw(1.0, top_k=2)) > 0).tolist() == [[True, True, True, True, False]]
    assert (cut(level, Draw(1.0, top_p=0.4)) > 0).tolist() == [[True, True, True, True, False]]


@pytest.mark.parametrize("size", [1, 2, 7, 40])
def test_each_number_falls_on_the_token_whose_part_it_lies_in(size):
    shares = np.random.default_rng(size).random(size) * (np.arange(size) % 3 != 1)
    numbers = np.r_[0.0, np.random.default_rng(1).random(200), 1 - 2**-24].astype(np.float32)
    found = np.asarray(inverse(jnp.tile(jnp.asarray(shares, jnp.float32), (len(numbers), 1)), jnp.asarray(numbers)))
    ends = np.cumsum(shares) / shares.sum()
    expected = np.searchsorted(ends, numbers, side="right")
    assert (shares[found] > 0).all()
    clear = np.abs(ends[:, None] - numbers).min(axis=0) > 1e-5
    assert (found == expected)[clear].all()
