import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsft.losses import PREFERENCE, weighted


def test_a_sum_weighs_each_term_and_gives_it_the_options_it_takes(draw):
    pairs = draw()
    terms = {"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.5}
    losses, _ = weighted(terms, beta=0.3, label_smoothing=0.1, divergence="reverse_kl")(pairs)
    given = {"sigmoid": {"beta": 0.3, "label_smoothing": 0.1}, "bco_pair": {"beta": 0.3}, "sft": {}}
    expected = sum(weight * PREFERENCE[name](pairs, **given[name])[0] for name, weight in terms.items())
    np.testing.assert_allclose(losses, expected, rtol=1e-6)


def test_one_term_is_that_loss_times_its_weight(draw):
    pairs = draw()
    for name, loss in PREFERENCE.items():
        losses, metrics = weighted({name: 2.0}, beta=0.4)(pairs)
        np.testing.assert_array_equal(losses, 2 * loss(pairs, beta=0.4)[0])
        assert metrics.keys() == loss(pairs, beta=0.4)[1].keys()


def test_metrics_are_of_all_terms_and_rewards_of_the_first_that_is_not_sft(draw):
    pairs = draw()
    _, metrics = weighted({"sft": 1.0, "simpo": 1.0, "orpo": 0.5, "sigmoid": 1.0}, beta=0.3)(pairs)
    assert metrics.keys() == {"rewards_chosen", "rewards_rejected", "log_odds", "nll"}
    np.testing.assert_array_equal(metrics["rewards_chosen"], PREFERENCE["simpo"](pairs, beta=0.3)[1]["rewards_chosen"])
    _, metrics = weighted({"sft": 1.0}, beta=0.3)(pairs)
    np.testing.assert_allclose(metrics["rewards_chosen"], 0.3 * (pairs.chosen - pairs.ref_chosen), rtol=1e-6)


def test_the_count_of_the_step_reaches_the_terms_that_take_it(draw):
    pairs = draw()
    loss = weighted({"sigmoid": 1.0, "sft": 2.0}, beta=0.3)
    found = jax.jit(loss)(pairs, mean_count=jnp.float32(100))[0]
    expected = PREFERENCE["sigmoid"](pairs, beta=0.3)[0] - 2 * pairs.chosen / 100
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    plain = weighted({"sigmoid": 1.0}, beta=0.3)
    np.testing.assert_array_equal(plain(pairs, mean_count=jnp.float32(100))[0], plain(pairs)[0])


@pytest.mark.parametrize(
    ("terms", "options", "message"),
    [
        ({}, {}, "needs a term, such as sigmoid: 1.0; there are sigmoid, "),
        ({"sigmoids": 1.0}, {}, "no preference loss 'sigmoids'; did you mean sigmoid\\? There are sigmoid, "),
        ({"xyz": 1.0}, {}, "no preference loss 'xyz'; There are sigmoid, "),
        (
            {"simpo": 1.0, "sft": 1.0},
            {"beta": 1.0, "tau": 1.0},
            "simpo, sft takes no tau; there are beta, gamma, label_",
        ),
        ({"sft": 1.0}, {"mean_count": 3.0}, "sft takes no mean_count; there are beta"),
        (
            {"sigmoid": 1.0, "apo_zero": 1.0},
            {"divergence": "forward_kl"},
            "divergence is forward_kl, and apo_zero knows reverse_kl alone: .*choose among sigmoid, .*discopop",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused_with_what_can(terms, options, message):
    with pytest.raises(ValueError, match=message):
        weighted(terms, **options)


def test_a_divergence_may_stand_beside_sft_and_reverse_kl_beside_anything(draw):
    pairs = draw()
    losses, _ = weighted({"hinge": 1.0, "sft": 1.0}, divergence="forward_kl")(pairs)
    expected = PREFERENCE["hinge"](pairs, divergence="forward_kl")[0] + PREFERENCE["sft"](pairs)[0]
    np.testing.assert_allclose(losses, expected, rtol=1e-6)
    weighted({"hinge": 1.0, "apo_zero": 1.0}, divergence="reverse_kl")
