import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsft.losses.aot import aot, aot_unpaired
from jaxsft.losses.scored import Scored

from .conftest import softplus


def sides(loss, pairs):
    """What is sorted against what, as lists."""
    chosen, rejected, ref_chosen, ref_rejected = (np.asarray(x, np.float64) for x in pairs[:4])
    if loss is aot:
        return (chosen - rejected).tolist(), (ref_chosen - ref_rejected).tolist()
    return (chosen - ref_chosen).tolist(), (rejected - ref_rejected).tolist()


@pytest.mark.parametrize("eps", [0.0, 0.2])
@pytest.mark.parametrize("loss", [aot, aot_unpaired])
def test_values_of_the_same_rank_are_compared_and_the_loss_is_with_its_pair(loss, eps, draw):
    pairs = draw(9)
    ours, theirs = sides(loss, pairs)
    expected = []
    for value in ours:
        rival = sorted(theirs)[sorted(ours).index(value)]
        gap = 0.3 * (value - rival)
        expected.append((1 - eps) * softplus(-gap) + eps * softplus(gap))
    losses, metrics = loss(pairs, beta=0.3, label_smoothing=eps)
    np.testing.assert_allclose(losses, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(metrics["rewards_chosen"], 0.3 * (pairs.chosen - pairs.ref_chosen), rtol=1e-6)


def test_three_pairs_by_hand():
    row = lambda *x: jnp.array(x, jnp.float32)
    ones = jnp.ones(4)
    # policy margins 1 4 2, reference margins 0 7 3, and a pair that does not exist between them
    pairs = Scored(
        row(1, 0, 4, 2), 0 * ones, row(0, 99, 7, 3), 0 * ones, ones, ones, jnp.array([True, False, True, True])
    )
    losses, _ = aot(pairs, beta=1.0)
    np.testing.assert_allclose(losses, [softplus(-1), 0, softplus(3), softplus(1)], rtol=1e-6)


@pytest.mark.parametrize("loss", [aot, aot_unpaired])
def test_pairs_that_do_not_exist_are_ranked_nowhere(loss, draw):
    pairs = draw(6)
    value = lambda pairs: jax.value_and_grad(lambda p: loss(p, beta=0.3)[0].sum(), allow_int=True)(pairs)
    alone, slopes = value(pairs)
    places = np.array([0, 2, 3, 5, 7, 8])
    spread = lambda x, fill: jnp.full(9, fill, x.dtype).at[places].set(x)
    for fill in (-1e30, 0.0, np.inf, np.nan):
        filled = Scored(*(spread(x, fill) for x in pairs[:6]), spread(pairs.exists, False))
        total, wide = value(filled)
        assert float(total) == pytest.approx(float(alone), rel=1e-6)
        for before, after in zip(slopes[:4], wide[:4], strict=True):
            np.testing.assert_allclose(after, spread(before, 0.0), atol=1e-7)


def test_a_batch_in_which_no_pair_exists_has_no_loss(draw):
    pairs = draw(3)._replace(exists=jnp.zeros(3, bool))
    assert aot(pairs)[0].tolist() == [0, 0, 0]
