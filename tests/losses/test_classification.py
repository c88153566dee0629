"""The cross entropy of classes against a loop, and its gradient against the closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsft import losses


@pytest.fixture(scope="module")
def given():
    draw = np.random.default_rng(0)
    targets = draw.dirichlet(np.ones(5), 6).astype(np.float32)
    targets[:3] = np.eye(5)[[1, 4, 1]]
    return draw.normal(size=(6, 5)).astype(np.float32), targets, draw.uniform(0.5, 2, 5).astype(np.float32)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_loop_over_examples_and_classes(given, smoothing, weighted):
    scores, targets, weights = given
    weights = weights if weighted else np.ones(5)
    loss, weight = losses.cross_entropy(
        jnp.asarray(scores), jnp.asarray(targets), weights=jnp.asarray(weights), smoothing=smoothing
    )
    for i in range(6):
        total = np.log(np.exp(scores[i].astype(np.float64)).sum())
        wanted = sum(
            weights[k] * ((1 - smoothing) * targets[i, k] + smoothing / 5) * (total - scores[i, k]) for k in range(5)
        )
        assert np.isclose(loss[i], wanted, rtol=1e-5)
        assert np.isclose(weight[i], (weights * targets[i]).sum(), rtol=1e-5)


def test_the_gradient_is_probabilities_less_targets(given):
    scores, targets, _ = given
    found = jax.grad(lambda x: losses.cross_entropy(x, jnp.asarray(targets))[0].sum())(jnp.asarray(scores))
    chances = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    assert np.allclose(found, chances - targets, atol=1e-6)


def test_half_precision_is_computed_with_in_full(given):
    scores = jnp.asarray(given[0], jnp.bfloat16)
    loss, _ = losses.cross_entropy(scores, jnp.asarray(given[1]))
    again, _ = losses.cross_entropy(scores.astype(jnp.float32), jnp.asarray(given[1]))
    assert loss.dtype == jnp.float32
    assert np.array_equal(loss, again)


def test_scores_far_apart_are_finite():
    loss, _ = losses.cross_entropy(jnp.array([[1e4, -1e4]]), jnp.array([[0.0, 1.0]]))
    assert float(loss[0]) == 2e4
