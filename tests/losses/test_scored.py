import jax
import jax.numpy as jnp
import numpy as np

from jaxsft.losses.scored import Scored, averages, existing, ratios, result


def test_pairs_that_exist_stay_as_they_are(draw):
    pairs = draw(5)
    for before, after in zip(pairs, existing(pairs), strict=True):
        np.testing.assert_array_equal(before, after)


def test_pairs_that_do_not_exist_hold_numbers_whatever_they_held_before(draw):
    pairs = draw(4)
    exists = jnp.array([True, False, True, False])
    bad = Scored(
        *(
            jnp.where(exists, x, value)
            for x, value in zip(pairs, [np.nan, np.inf, -np.inf, np.nan, 0, np.nan, 0], strict=True)
        )
    )
    held = existing(bad._replace(exists=exists))
    for array in (*ratios(held), *averages(held)):
        assert np.isfinite(array).all()


def test_an_answer_without_tokens_is_divided_by_one(draw):
    pairs = draw(3)._replace(chosen_count=jnp.zeros(3))
    np.testing.assert_array_equal(averages(existing(pairs))[0], pairs.chosen)


def test_results_and_their_gradients_are_zero_where_no_pair_exists(draw):
    pairs = draw(4)._replace(exists=jnp.array([True, False, True, False]))

    def loss(chosen):
        held = existing(pairs._replace(chosen=chosen))
        losses, metrics = result(held, 1 / (held.chosen + 1.5), ratios(held), other=held.chosen)
        return losses.sum(), (losses, metrics)

    slope, (losses, metrics) = jax.grad(loss, has_aux=True)(pairs.chosen.at[1].set(jnp.nan))
    assert metrics.keys() == {"rewards_chosen", "rewards_rejected", "other"}
    for array in (slope, losses, *metrics.values()):
        assert np.isfinite(array).all()
        assert (np.asarray(array)[[1, 3]] == 0).all()
        assert (np.asarray(array)[[0, 2]] != 0).all()
