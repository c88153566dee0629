"""The sum of log-probabilities: that of `logprobs`, values and gradients, for a product less where the table trains."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsft import losses
from jaxsft.losses import summed

from .test_logprobs import MASKS, arrays, reference
from .test_shards import large, placed

HEADS = {"plain": {}, "scaled": {"scale": 0.3}, "capped": {"soft_cap": 1.5}, "both": {"scale": 0.7, "soft_cap": 2.0}}


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """Chunks of as few tokens as `Chunk` says, so that these small arrays have several."""
    monkeypatch.setattr(summed, "FEWEST", 1)


def by_hand(features, table, targets, mask, scale=1.0, soft_cap=None):
    if soft_cap is None:
        return reference(scale * features, table, targets, mask).sum()
    every = jax.nn.log_softmax(soft_cap * jnp.tanh(scale * features @ table.T / soft_cap), axis=-1)
    return jnp.where(mask, jnp.take_along_axis(every, targets[..., None], axis=-1)[..., 0], 0.0).sum()


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("chunk", [(1, 11), (5, 11), (1000, 1000)])
@pytest.mark.parametrize("trains", [(0,), (0, 1), (1,)], ids=str)
def test_value_and_gradients_are_those_of_all_scores_at_once(trains, chunk, head):
    features, table, targets, _ = arrays()
    scaled = lambda f, **more: lambda *given: -2.5 * f(*given, **more, **head)
    pull = lambda loss: jax.jit(jax.value_and_grad(loss, trains))
    ours, theirs = pull(scaled(losses.total, chunk=losses.Chunk(*chunk))), pull(scaled(by_hand))
    for mask in map(jnp.asarray, MASKS.values()):
        given = features, table, targets, mask
        (value, found), (expected, exact) = ours(*given), theirs(*given)
        np.testing.assert_allclose(value, expected, rtol=1e-6, atol=1e-6)
        for one, other in zip(found, exact, strict=True):
            np.testing.assert_allclose(one, other, atol=2e-5)


def test_it_is_the_sum_of_logprobs_with_and_without_a_gradient():
    features, table, targets, _ = arrays()
    mask = jnp.asarray(MASKS["ragged"])
    expected = losses.logprobs(features, table, targets, mask).sum()
    assert losses.total(features, table, targets, mask) == expected
    value, _ = jax.value_and_grad(losses.total)(features, table, targets, mask)
    np.testing.assert_allclose(value, expected, rtol=1e-6)


def test_bfloat16_is_rounded_as_in_logprobs():
    features, table, targets, _ = arrays(jnp.bfloat16)
    given = features, table, targets, jnp.asarray(MASKS["all"])
    slow = lambda *given: losses.logprobs(*given).sum()
    for found, expected in zip(*(jax.grad(f, (0, 1))(*given) for f in (losses.total, slow)), strict=True):
        assert found.dtype == expected.dtype
        np.testing.assert_allclose(found.astype(jnp.float32), expected.astype(jnp.float32), rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    "shape", [{"data": 2, "fsdp": 4}, {"fsdp": 2, "context": 4}, {"fsdp": 2, "tensor": 4}], ids=str
)
def test_on_a_mesh_it_is_that_of_one_device(shape):
    mesh, (features, table, targets, mask, _) = placed(shape)
    pull = lambda mesh: jax.jit(
        jax.value_and_grad(functools.partial(losses.total, mesh=mesh, chunk=losses.Chunk(8, 96)), (0, 1))
    )
    value, grads = pull(mesh)(features, table, targets, mask)
    expected, exact = pull(None)(*large()[:4])
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for one, other in zip(grads, exact, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=2e-5)


def products(f, trains) -> int:
    """Of the scores' size, in the compiled forward and backward pass."""
    features, table, targets, _ = arrays()
    run = jax.jit(jax.grad(lambda *given: f(*given, targets, jnp.asarray(MASKS["all"])), trains))
    program = str(jax.make_jaxpr(run)(features, table))
    return program.count("dot_general[")


def test_a_trained_table_costs_three_products_and_a_frozen_one_two():
    slow = lambda *given: losses.logprobs(*given).sum()
    ours, theirs = (products(f, (0, 1)) for f in (losses.total, slow))
    assert ours == 3
    assert theirs - ours >= 1
    assert products(losses.total, 0) == products(slow, 0)
