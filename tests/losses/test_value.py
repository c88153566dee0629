import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsft.losses import clipped_value, explained_variance

MASK = np.random.default_rng(9).random((4, 6)) < 0.7


@pytest.fixture
def given():
    """values, old, returns and mask; not finite off the mask."""
    random = np.random.default_rng(0)
    old, returns = random.normal(size=(2, 4, 6))
    values = old + random.normal(scale=0.3, size=(4, 6))
    return *(jnp.asarray(np.where(MASK, x, np.nan), jnp.float32) for x in (values, old, returns)), jnp.asarray(MASK)


@pytest.mark.parametrize("clip", [0.2, None])
def test_the_loss_is_half_the_larger_square_of_each_token(clip, given):
    loss, clipped = clipped_value(*given, clip=clip)
    for row in range(4):
        for t in range(6):
            v, old, target = (float(x[row, t]) for x in given[:3])
            if not MASK[row, t]:
                assert float(loss[row, t]) == 0
                assert not clipped[row, t]
                continue
            held = v if clip is None else min(max(v, old - clip), old + clip)
            free, bound = (v - target) ** 2, (held - target) ** 2
            assert float(loss[row, t]) == pytest.approx(max(free, bound) / 2, rel=1e-5)
            assert bool(clipped[row, t]) == (bound > free)
    assert bool(clipped.any()) == (clip is not None)


def test_a_clipped_token_has_no_gradient_and_the_others_have_their_error(given):
    values, old, returns, mask = given
    slope = jax.grad(lambda values: clipped_value(values, old, returns, mask).loss.sum())(values)
    clipped = np.asarray(clipped_value(*given).clipped)
    # Inside of the bounds, or outside of them with the larger error, a value moves by its error.
    np.testing.assert_allclose(slope, np.where(MASK & ~clipped, values - returns, 0), rtol=1e-6, atol=1e-7)


def test_the_share_of_variance_is_that_of_numpy(given):
    values, _, returns, mask = given
    explained, total = explained_variance(values, returns, mask)
    v, r = (np.asarray(x, np.float64)[MASK] for x in (values, returns))
    assert float(explained / total) == pytest.approx(1 - np.var(r - v) / np.var(r), rel=1e-5)


def test_values_that_are_right_explain_all_and_a_constant_nothing(given):
    _, _, returns, mask = given
    for values, share in ((returns, 1.0), (0 * returns + 3, 0.0)):
        explained, total = explained_variance(jnp.where(mask, values, jnp.inf), returns, mask)
        assert float(explained / total) == pytest.approx(share, abs=1e-5)


def test_nothing_to_explain_is_zero_of_zero():
    assert [float(x) for x in explained_variance(jnp.ones(3), jnp.ones(3), jnp.zeros(3, bool))] == [0.0, 0.0]
