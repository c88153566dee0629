"""Nearest neighbours against a loop; the linear probe against the condition that its optimum has."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxsft import probe

draw = np.random.default_rng(0)
CENTRES = draw.normal(size=(3, 6)) * 2
LABELS = draw.integers(0, 3, 60)
KNOWN = (CENTRES[LABELS] + draw.normal(size=(60, 6))).astype(np.float32)
TRUTH = draw.integers(0, 3, 40)
OTHERS = (CENTRES[TRUTH] + draw.normal(size=(40, 6))).astype(np.float32)


def test_the_nearest_vote_by_their_cosine():
    got = np.asarray(probe.neighbours(KNOWN, LABELS, OTHERS, classes=3, k=4, temperature=0.2))
    for vector, votes in zip(OTHERS, got, strict=True):
        alike = [vector @ one / np.linalg.norm(vector) / np.linalg.norm(one) for one in KNOWN]
        nearest = np.argsort(alike)[::-1][:4]
        weights, expected = np.exp(np.array(alike)[nearest] / 0.2), np.zeros(3)
        for i, weight in zip(nearest, weights / weights.sum(), strict=True):
            expected[LABELS[i]] += weight
        np.testing.assert_allclose(votes, expected, atol=1e-5)
    assert probe.accuracy(got, TRUTH) > 0.8


def test_fewer_known_than_asked_for_all_vote():
    got = probe.neighbours(KNOWN[:2], np.array([0, 1]), OTHERS, classes=3, k=20)
    np.testing.assert_allclose(np.asarray(got).sum(1), 1, atol=1e-6)
    assert not np.asarray(got)[:, 2].any()


def test_the_linear_probe_is_at_its_optimum():
    decay = 0.05
    standard = (KNOWN - KNOWN.mean(0)) / KNOWN.std(0)
    lp = np.asarray(probe.linear(KNOWN, LABELS, KNOWN, classes=3, decay=decay))
    off = (np.exp(lp) - np.eye(3)[LABELS]) / len(LABELS)  # the gradient by the scores
    np.testing.assert_allclose(off.sum(0), 0, atol=1e-4)  # by the bias
    # By the weights X^T off + decay W = 0, which makes known scores of W: x W + b, up to a number a row.
    weights = -standard.T @ off / decay
    scores = standard @ weights
    free = lambda x: x - x.mean(1, keepdims=True)
    difference = free(lp) - free(scores)
    np.testing.assert_allclose(difference, np.broadcast_to(difference.mean(0), difference.shape), atol=2e-2)
    assert probe.accuracy(probe.linear(KNOWN, LABELS, OTHERS, classes=3), TRUTH) > 0.8


def test_both_give_the_same_twice_and_know_no_scale():
    for way in (probe.neighbours, probe.linear):
        first = way(KNOWN, LABELS, OTHERS, classes=3)
        np.testing.assert_array_equal(first, way(KNOWN, LABELS, OTHERS, classes=3))
        scaled = way(8 * KNOWN, LABELS, 8 * OTHERS, classes=3)
        np.testing.assert_allclose(jax.nn.softmax(first), jax.nn.softmax(scaled), atol=1e-3)


def test_accuracy_counts_the_first_of_equals():
    assert probe.accuracy(jnp.zeros((4, 3)), jnp.array([0, 1, 0, 2])) == 0.5
