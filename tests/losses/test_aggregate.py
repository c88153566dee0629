import jax.numpy as jnp
import numpy as np
import pytest

from jaxsft.losses import AGGREGATES, LOSS_TYPES, POLICY, aggregate

from .test_episodes import LEARNED, SEGMENTS

LENGTH = 5


def by_hand(name, loss, mask):
    """The loss of a step from a list of its episodes' losses, with numpy's means."""
    every = [(i, k) for i in range(4) for k in (1, 2, 3) if (SEGMENTS[i] == k).any()]
    tokens = [loss[i, (SEGMENTS[i] == k) & mask[i]] for i, k in every]
    if name == "token":
        return np.concatenate(tokens).mean()
    if name == "sequence":
        return np.mean([own.mean() if len(own) else 0.0 for own in tokens])
    return np.mean([own.sum() / LENGTH for own in tokens])


@pytest.mark.parametrize("name", AGGREGATES)
@pytest.mark.parametrize("cut", [False, True], ids=["all learned", "one episode masked"])
def test_a_step_is_divided_once_however_it_is_cut_into_microbatches(name, cut):
    loss = np.random.default_rng(0).normal(size=SEGMENTS.shape)
    mask = LEARNED & ~(cut & (SEGMENTS == 2))  # of the truncated, no token is learned; they count among episodes
    total = weight = 0.0
    for rows in ([0], [1, 2], [3]):
        weights, own = aggregate(name, jnp.asarray(mask[rows]), jnp.asarray(SEGMENTS[rows]), max_new_tokens=LENGTH)
        assert not np.asarray(weights)[~mask[rows]].any()
        total, weight = total + (loss[rows] * weights).sum(), weight + float(own)
    assert total / weight == pytest.approx(by_hand(name, loss, mask), rel=1e-5)


@pytest.mark.parametrize("name", AGGREGATES)
def test_rows_that_only_fill_up_a_batch_weigh_nothing(name):
    nothing = jnp.zeros((2, 8), int)
    weights, total = aggregate(name, nothing > 0, nothing, max_new_tokens=LENGTH)
    assert not weights.any()
    assert float(total) == 0


def test_an_unknown_aggregate_or_no_length_raises():
    here = jnp.ones((1, 2), int)
    with pytest.raises(ValueError, match="no aggregate 'mean'; there are token, sequence, fixed"):
        aggregate("mean", here > 0, here)
    with pytest.raises(ValueError, match="fixed divides by max_new_tokens"):
        aggregate("fixed", here > 0, here)


def test_loss_types_are_made_of_losses_and_aggregates_that_exist():
    assert {kind.policy for kind in LOSS_TYPES.values()} == POLICY.keys()
    assert {kind.aggregate for kind in LOSS_TYPES.values()} == set(AGGREGATES)
