import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsft.losses import ESTIMATORS, adapt, kl


@pytest.mark.parametrize("name", ESTIMATORS)
def test_an_estimate_is_its_formula_token_by_token_and_nothing_off_the_mask(name):
    random = np.random.default_rng(0)
    policy, reference = -random.exponential(size=(2, 3, 5)).astype(np.float32)
    mask = random.random((3, 5)) < 0.6
    formula = {"k1": lambda u: -u, "k2": lambda u: u * u / 2, "k3": lambda u: math.exp(u) - 1 - u}[name]
    expected = [formula(float(r) - float(p)) for p, r in zip(policy.ravel(), reference.ravel(), strict=True)]
    bad = jnp.asarray(np.where(mask, policy, -np.inf)), jnp.asarray(np.where(mask, reference, np.nan))
    total = lambda policy: (kl(policy, bad[1], jnp.asarray(mask), estimator=name) ** 2).sum()
    np.testing.assert_allclose(
        kl(*bad, jnp.asarray(mask), estimator=name),
        np.where(mask, np.reshape(expected, (3, 5)), 0),
        rtol=2e-5,
        atol=1e-7,
    )
    slope = np.asarray(jax.grad(total)(bad[0]))
    assert np.isfinite(slope).all()
    assert not slope[~mask].any()


def test_the_means_of_k1_and_k3_are_the_divergence():
    """Over all tokens of a vocabulary, each as often as the policy draws it."""
    policy, reference = (jax.nn.log_softmax(jnp.asarray(np.random.default_rng(i).normal(size=9))) for i in (0, 1))
    p, q = np.exp(np.asarray(policy, np.float64)), np.exp(np.asarray(reference, np.float64))
    exact = (p * np.log(p / q)).sum()
    for name in ("k1", "k3"):
        assert float((p * kl(policy, reference, policy < 0, estimator=name)).sum()) == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize("name", ["k2", "k3"])
def test_k2_and_k3_are_never_negative_and_zero_where_both_agree(name):
    apart = jnp.linspace(-30.0, 30.0, 301)
    found = kl(jnp.zeros(301), apart, apart < 99, estimator=name)
    assert (np.asarray(found) >= 0).all()
    assert float(found[150]) == pytest.approx(0, abs=1e-10)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_far_log_ratios_have_finite_estimates_and_gradients(name):
    far = jnp.array([-1e4, -100.0, 100.0, 1e4])
    found, slope = jax.value_and_grad(lambda x: kl(x, 0 * x, far < 1e9, estimator=name).sum())(far)
    assert np.isfinite(found)
    assert np.isfinite(slope).all()


def test_an_unknown_estimator_raises():
    with pytest.raises(ValueError, match="estimator is k4; it must be one of k1, k2, k3"):
        kl(jnp.zeros(1), jnp.zeros(1), jnp.ones(1, bool), estimator="k4")


@pytest.mark.parametrize(("found", "factor"), [(6.0, 1.0), (6.6, 1.01), (600.0, 1.02), (5.4, 0.99), (0.0, 0.98)])
def test_the_coefficient_follows_the_target_by_a_fifth_at_most_of_a_tenth(found, factor):
    coefficient = adapt(jnp.float32(0.2), jnp.float32(found), target=6.0, horizon=1000, steps=100)
    assert float(coefficient) == pytest.approx(0.2 * factor, rel=1e-6)
