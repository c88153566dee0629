"""The objective over images: a linear model, and images of three classes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxsft import augment, objectives, sharding, train
from jaxsft.models import TowerConfig, build
from jaxsft.types import Images

K, SIZE = 3, 8
CONFIG = TowerConfig(16, 32, 1, heads=2, image_size=SIZE, patch=4, labels=K)
FULL = augment.Config(crop=0.5, mixup=0.4, cutmix=1.0, label_smoothing=0.1)
WEIGHTS = np.array([0.5, 1.0, 2.0], np.float32)
normalise = lambda pixels: pixels.astype(jnp.float32) / 127.5 - 1


@pytest.fixture(scope="module")
def model():
    return build(CONFIG)


@pytest.fixture(scope="module")
def params(model):
    made = jax.jit(model.init)(jax.random.key(0))
    return jax.tree.map(lambda x: 3 * x if x.ndim > 1 else x, made)


def made(count: int, real: int) -> Images:
    draw = np.random.default_rng(0)
    column = lambda values, kind: np.asarray(values)[:, None].astype(kind)
    numbers = np.arange(count)
    pixels = draw.integers(0, 256, (count, SIZE, SIZE, 3), np.uint8)
    rows = np.where(numbers < real, numbers, -1)
    return Images(pixels, column(numbers % K, np.int32), column(rows, np.int32), column(numbers + 7, np.uint32))  # type: ignore


def scores_of(model, params, pixels) -> np.ndarray:
    """Class scores of normalised pixels, by the parameters themselves."""
    features = jax.jit(model.features)({"params": params}, jnp.asarray(pixels))[:, 0]
    kernel, bias = params["classifier"]["kernel"], params["classifier"]["bias"]
    return np.asarray(features[:, : CONFIG.hidden] @ kernel + bias, np.float64)


@pytest.fixture(scope="module")
def learned(model):
    return objectives.classification(model, normalise, how=FULL, weights=jnp.asarray(WEIGHTS), key=jax.random.key(1))


def test_evaluation_is_the_plain_cross_entropy_of_real_images(model, params, learned):
    batch = made(8, 6)
    sums = jax.jit(lambda params: learned.objective({"params": params}, batch, None))(params)
    scores = scores_of(model, params, normalise(jnp.asarray(batch.pixels)))
    lines = [np.log(np.exp(scores[i]).sum()) - scores[i, i % K] for i in range(6)]
    right = sum(scores[i].argmax() == i % K for i in range(6))
    assert np.isclose(sums.loss, sum(lines), rtol=1e-5)
    assert (float(sums.weight), float(sums.metrics["accuracy"].total), sums.metrics["accuracy"].weight) == (6, right, 6)


def test_training_weighs_and_smooths_what_augmentation_made_of_the_images(model, params, learned):
    batch = made(8, 6)
    change = jax.jit(lambda batch: augment.apply(FULL, batch, jax.random.key(1), classes=K, normalise=normalise))
    changed = change(batch)
    scores = scores_of(model, params, changed.pixels)
    loss = weight = 0.0
    for i in range(6):
        logprobs = scores[i] - np.log(np.exp(scores[i]).sum())
        target = np.asarray(changed.targets)[i]
        loss -= (WEIGHTS * (0.9 * target + 0.1 / K) * logprobs).sum()
        weight += (WEIGHTS * target).sum()
    sums = jax.jit(lambda params: learned.objective({"params": params}, batch, jax.random.key(5)))(params)
    assert np.isclose(sums.loss, loss, rtol=1e-5)
    assert np.isclose(sums.weight, weight, rtol=1e-5)


@functools.cache
def _tx():
    return optax.sgd(0.1)


def stepped(learned, params, batch, *, microbatches=1, mesh=None):
    """Parameters after a step, and its metrics."""
    state = train.init({"params": params}, _tx(), jax.random.key(2), mesh)
    where = None if mesh is None else sharding.of(state)
    step = train.make_step(
        learned.objective, _tx(), prepare=learned.prepare, microbatches=microbatches, shardings=where
    )
    if mesh is not None:
        batch = jax.tree.map(lambda x: jax.device_put(x, sharding.rows(mesh)), batch)
    state, metrics = step(state, {}, batch)
    return jax.device_get((state.trainable, metrics))


def test_microbatches_and_devices_change_nothing(params, learned):
    batch, copy = made(16, 13), lambda: jax.tree.map(jnp.copy, params)
    once, told = stepped(learned, copy(), batch)
    mesh = sharding.mesh(4, 2, 1)
    spread = jax.tree.map(lambda x: jax.device_put(x, sharding.whole(mesh)), copy())
    found, metrics = stepped(learned, spread, batch, microbatches=2, mesh=mesh)
    assert metrics.keys() == told.keys()
    for name in told:
        assert np.isclose(metrics[name], told[name], rtol=1e-4), name
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(once), strict=True):
        assert np.allclose(one, other, atol=1e-5)


def test_a_model_without_a_classifier_is_refused():
    with pytest.raises(ValueError, match="no classifier; load it with labels"):
        objectives.classification(build(dataclasses.replace(CONFIG, labels=0)), normalise)
