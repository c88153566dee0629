"""What every registered loss keeps to."""

import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsft.losses import COUNTED, COUPLED, POLICY, PREFERENCE, UNPAIRED, WITHOUT_REFERENCE, Scored

N = 6
NAMES = list(PREFERENCE)
# Signs of the gradients by chosen and by rejected where all agrees, for the losses that are made otherwise: the two
# terms of apo_down cancel for the chosen answer, sft knows no rejected one, and discopop has a hill there.
OTHER_WAY = {"apo_down": (0, 0, 1, 1), "sft": (-1, -1, 0, 0), "discopop": (1, 1, -1, -1)}


def pairs(seed=0, *, same=False):
    """Random pairs; `same`: policy and reference agree, and so do both answers."""
    random = np.random.default_rng(seed)
    counts = random.integers(1, 9, (2, N))
    policy = -random.exponential(1.0, (2, N)) * counts - 0.1
    reference = policy + random.normal(scale=3.0, size=(2, N))
    if same:
        policy = reference = np.full((2, N), -4.0)
        counts = np.full((2, N), 5)
    return Scored(*(jnp.asarray(x, jnp.float32) for x in (*policy, *reference, *counts)), jnp.ones(N, bool))


@pytest.fixture(scope="module")
def run():
    """run(name, pairs) -> losses, metrics, and the gradient of the losses' sum by chosen and by rejected."""
    compiled = {}

    def make(name):
        def total(policy, pairs):
            losses, metrics = PREFERENCE[name](pairs._replace(chosen=policy[0], rejected=policy[1]))
            return losses.sum(), (losses, metrics)

        return jax.jit(jax.grad(total, has_aux=True))

    def call(name, given):
        if name not in compiled:
            compiled[name] = make(name)
        slopes, (losses, metrics) = compiled[name](given[:2], given)
        return losses, metrics, *slopes

    return call


def test_the_sets_speak_of_losses_that_exist():
    assert PREFERENCE.keys() >= WITHOUT_REFERENCE | COUPLED | COUNTED
    takes = {name for name, loss in PREFERENCE.items() if "mean_count" in inspect.signature(loss).parameters}
    assert takes == COUNTED


@pytest.mark.parametrize("loss", [*PREFERENCE.values(), *UNPAIRED.values()], ids=[*PREFERENCE, *UNPAIRED])
def test_a_loss_names_its_paper_shows_an_example_and_takes_beta(loss):
    assert re.search(r"Source: .*?\d{4}.*arXiv:\d{4}\.\d{5}", inspect.getdoc(loss), re.DOTALL)
    assert ">>> " in inspect.getdoc(loss)
    assert inspect.signature(loss).parameters["beta"].default == 0.1


@pytest.mark.parametrize("name", NAMES)
def test_losses_metrics_and_gradients_are_finite_float32_one_a_pair(name, run):
    losses, metrics, *slopes = run(name, pairs())
    assert metrics.keys() >= {"rewards_chosen", "rewards_rejected"}
    for array in (losses, *metrics.values(), *slopes):
        assert array.shape == (N,)
        assert array.dtype == jnp.float32
        assert np.isfinite(array).all()
    assert np.abs(slopes[0]).max() > 0


@pytest.mark.parametrize("name", NAMES)
def test_where_all_agrees_the_gradient_raises_chosen_and_lowers_rejected(name, run):
    *_, chosen, rejected = run(name, pairs(same=True))
    signs = np.sign(chosen).max(), np.sign(chosen).min(), np.sign(rejected).max(), np.sign(rejected).min()
    assert signs == OTHER_WAY.get(name, (-1, -1, 1, 1))


@pytest.mark.parametrize("name", NAMES)
def test_pairs_that_only_fill_up_a_batch_are_nothing_and_change_nothing(name, run):
    whole, exists = pairs(), jnp.array([True, True, False, True, False, True])
    here = np.flatnonzero(exists)
    alone = jax.jit(lambda pairs: PREFERENCE[name](pairs))(Scored(*(x[here] for x in whole)))
    for bad in (0.0, np.nan, np.inf, -np.inf):
        filled = Scored(*(jnp.where(exists, x, bad) for x in whole[:6]), exists)
        losses, metrics, *slopes = run(name, filled)
        for array in (losses, *metrics.values(), *slopes):
            assert np.isfinite(array).all()
            assert (np.asarray(array)[~np.asarray(exists)] == 0).all()
        np.testing.assert_allclose(losses[here], alone[0], rtol=1e-6)
        for key, value in alone[1].items():
            np.testing.assert_allclose(metrics[key][here], value, rtol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_in_which_no_pair_exists_is_zero(name, run):
    losses, metrics, *slopes = run(name, pairs()._replace(exists=jnp.zeros(N, bool)))
    assert not any(np.asarray(array).any() for array in (losses, *metrics.values(), *slopes))


@pytest.mark.parametrize("name", NAMES)
def test_far_log_probabilities_have_finite_losses_and_gradients(name, run):
    far = jnp.array([-1e5, -1e5, -1e-9, -1e-9, -100.0, 0.0], jnp.float32)
    for reference in (0 * far, far[::-1], -jnp.array([1e5, 0.0, 1e5, 0.0, 50.0, 1.0])):
        given = pairs()._replace(chosen=far, rejected=far[::-1], ref_chosen=reference, ref_rejected=0 * far)
        assert all(np.isfinite(array).all() for array in jax.tree.leaves(run(name, given)))


@pytest.mark.parametrize("name", [name for name in NAMES if name not in COUPLED | COUNTED])
def test_a_loss_of_one_pair_knows_nothing_of_the_others(name, run):
    first, second = pairs(0), pairs(1)
    mixed = Scored(*(jnp.concatenate([a[:3], b[3:]]) for a, b in zip(first, second, strict=True)))
    expected = jnp.concatenate([run(name, first)[0][:3], run(name, second)[0][3:]])
    np.testing.assert_array_equal(run(name, mixed)[0], expected)


@pytest.mark.parametrize("name", sorted(WITHOUT_REFERENCE))
def test_a_loss_without_reference_is_the_same_with_any(name, run):
    given = pairs()
    other = given._replace(ref_chosen=0 * given.chosen, ref_rejected=given.chosen)
    np.testing.assert_array_equal(run(name, given)[0], run(name, other)[0])


SEGMENTS = jnp.array([[1, 1, 1, 2, 2, 2, 0, 0], [1, 1, 1, 1, 2, 2, 3, 3]])
LEARNED = jnp.array([[1, 1, 0, 1, 1, 0, 0, 0], [0, 1, 1, 0, 1, 0, 1, 0]]) > 0


def policy(name):
    """(logprobs, old, advantages) -> (loss, clipped, ratio), gradient of the losses' sum by logprobs."""

    def total(logprobs, old, advantages):
        found = POLICY[name](logprobs, old, advantages, LEARNED, SEGMENTS)
        return found.loss.sum(), found

    slope = jax.jit(jax.grad(total, has_aux=True))
    return lambda *given: slope(*(jnp.asarray(x, jnp.float32) for x in given))[::-1]


@pytest.mark.parametrize("name", POLICY)
def test_a_policy_loss_names_its_paper_and_shows_an_example(name):
    assert re.search(r"Source: .*?\d{4}.*arXiv:\d{4}\.\d{5}", inspect.getdoc(POLICY[name]), re.DOTALL)
    assert ">>> " in inspect.getdoc(POLICY[name])


@pytest.mark.parametrize("name", POLICY)
def test_policy_losses_are_finite_and_nothing_leaks_through_the_mask(name):
    run, random = policy(name), np.random.default_rng(0)
    old, advantages = -random.exponential(size=SEGMENTS.shape), random.normal(size=SEGMENTS.shape)
    far = old + random.choice([-1e4, -100.0, -1.0, 0.0, 0.1, 100.0, 1e4], SEGMENTS.shape)
    for now in (old, far):
        clean = run(now, old, advantages)
        for bad in (np.nan, np.inf, -np.inf):
            (loss, clipped, ratio), slope = found = run(*(np.where(LEARNED, x, bad) for x in (now, old, advantages)))
            for array in (loss, clipped, ratio, slope):
                assert array.shape == SEGMENTS.shape
                assert np.isfinite(array).all()
                assert not np.asarray(array)[~np.asarray(LEARNED)].any()
            assert (loss.dtype, clipped.dtype, ratio.dtype) == (jnp.float32, bool, jnp.float32)
            for array, expected in zip(jax.tree.leaves(found), jax.tree.leaves(clean), strict=True):
                np.testing.assert_array_equal(array, expected)


@pytest.mark.parametrize("name", POLICY)
def test_a_policy_loss_makes_good_tokens_likelier_and_those_without_advantage_stay(name):
    run, old = policy(name), np.full(SEGMENTS.shape, -1.0)
    for advantage in (1.0, -1.0, 0.0):
        _, slope = run(old, old, np.full(SEGMENTS.shape, advantage))
        assert (np.sign(slope)[np.asarray(LEARNED)] == -np.sign(advantage)).all()
    _, slope = run(old + 100, old, 0 * old)
    assert not np.asarray(slope).any()
