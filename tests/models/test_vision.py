"""Layers of images against plain loops; what a batch's statistics do in training."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxsft import make_step, models, optim, train, tree
from jaxsft.models import ConvNextConfig, ResNetConfig, TowerConfig
from jaxsft.models.vision.layers import BatchNorm, Conv
from jaxsft.models.vision.positions import cubic, matrix, resample
from jaxsft.models.vision.residual import max_pool
from jaxsft.types import Sums


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("how", [{"size": 3, "stride": 2}, {"size": 3, "groups": 4}, {"size": 2, "padded": False}])
def test_a_convolution_is_the_loop_over_its_windows(how):
    x, conv = normal(2, 5, 6, 4), Conv(8, **how)
    params = conv.init(jax.random.key(0), x)["params"]
    params["bias"] = params["bias"] + 0.5
    size, stride, groups = how["size"], how.get("stride", 1), how.get("groups", 1)
    pad = size // 2 if how.get("padded", True) else 0
    padded = np.pad(x, [(0, 0), (pad, pad), (pad, pad), (0, 0)])
    filters, got = np.asarray(params["filters"]), np.asarray(conv.apply({"params": params}, x))
    for b, i, j, o in np.ndindex(*got.shape):
        inside = slice(o // (8 // groups) * (4 // groups), (o // (8 // groups) + 1) * (4 // groups))
        window = padded[b, i * stride : i * stride + size, j * stride : j * stride + size, inside]
        np.testing.assert_allclose(got[b, i, j, o], (window.transpose(2, 0, 1) * filters[o]).sum() + 0.5, atol=1e-5)


def test_the_largest_of_neighbours():
    x = normal(2, 5, 6, 3)
    padded = np.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)], constant_values=-np.inf)
    got = np.asarray(max_pool(jnp.asarray(x)))
    assert got.shape == (2, 3, 3, 3)
    for i, j in np.ndindex(3, 3):
        np.testing.assert_array_equal(got[:, i, j], padded[:, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3].max((1, 2)))


@pytest.mark.parametrize(("old", "new"), [(4, 4), (4, 7), (7, 3)])
@pytest.mark.parametrize("antialias", [False, True])
def test_interpolation_keeps_constants_and_the_grid_itself(old, new, antialias):
    weights = matrix(old, new, antialias=antialias)
    np.testing.assert_allclose(weights.sum(1), 1, atol=1e-12)
    if old == new:
        np.testing.assert_allclose(weights, np.eye(old), atol=1e-12)


def test_interpolation_is_cubic_convolution_with_repeated_edges():
    values, new = normal(6), 10
    for i in range(new):
        at = (i + 0.5) * 6 / new - 0.5
        around = [int(np.floor(at)) + k for k in (-1, 0, 1, 2)]
        expected = sum(values[min(max(j, 0), 5)] * cubic(np.array(at - j), -0.75) for j in around)
        np.testing.assert_allclose(matrix(6, new)[i] @ values, expected, atol=1e-6)
    grid = normal(4 * 6, 2)
    rows = np.stack([matrix(6, 5) @ line for line in grid.reshape(4, 6, 2)])
    expected = np.stack([matrix(4, 3) @ column for column in rows.transpose(1, 0, 2)], axis=1)
    np.testing.assert_allclose(resample(jnp.asarray(grid), (4, 6), (3, 5)), expected.reshape(15, 2), atol=1e-5)


def norm_leaves(width):
    draw = np.random.default_rng(1)
    leaf = lambda: draw.uniform(0.5, 1.5, width).astype(np.float32)
    return {name: leaf() for name in ("scale", "bias", "running_mean", "running_var")}


def test_a_frozen_norm_uses_what_it_has():
    x, leaves = normal(3, 2, 2, 4), norm_leaves(4)
    got, drift = BatchNorm().apply({"params": leaves}, x)
    expected = (x - leaves["running_mean"]) / np.sqrt(leaves["running_var"] + 1e-5) * leaves["scale"] + leaves["bias"]
    np.testing.assert_allclose(got, expected, atol=1e-5)
    assert drift == 0


def test_a_norm_that_follows_uses_the_batchs_real_rows_and_says_where_to_go():
    x, leaves, rows = normal(4, 3, 2, 5), norm_leaves(5), np.array([True, True, False, True])
    run = lambda leaves: BatchNorm(follow=True).apply({"params": leaves}, x, rows)
    got, drift = run(leaves)
    real = x[rows].reshape(-1, 5)
    expected = (x - real.mean(0)) / np.sqrt(real.var(0) + 1e-5) * leaves["scale"] + leaves["bias"]
    np.testing.assert_allclose(got, expected, atol=1e-5)
    assert drift == 0
    grads = jax.grad(lambda leaves: run(leaves)[1])(leaves)
    np.testing.assert_allclose(grads["running_mean"], leaves["running_mean"] - real.mean(0), atol=1e-6)
    np.testing.assert_allclose(grads["running_var"], leaves["running_var"] - real.var(0, ddof=1), atol=1e-6)


RESNET = ResNetConfig(4, (4, 8), (1, 2), bottleneck=False, labels=3)


@pytest.fixture(scope="module")
def resnet():
    model = models.build(RESNET, follows="params/.*")
    return model, {"params": jax.jit(model.init)(jax.random.key(0))}


def loss_of(model):
    """The sum of a loss over images, as an objective has it."""

    def objective(variables, batch, key):
        images, labels = batch
        features, drift = model.learn(variables, images, dropout=key)
        scores = models.logits(model, variables, features)[:, 0]
        total = optax.softmax_cross_entropy_with_integer_labels(scores, labels).sum()
        weight = jnp.float32(len(labels))
        return Sums(total + drift * weight, weight, {})

    return objective


@pytest.mark.parametrize("microbatches", [1, pytest.param(2, marks=pytest.mark.parity)])
def test_a_step_moves_statistics_a_tenth_of_the_way_and_clips_weights_alone(resnet, microbatches):
    model, variables = resnet
    batch = normal(4, 16, 16, 3) * 5, np.array([0, 1, 2, 0])
    tx, _ = optim.build(optim.Config(learning_rate=1e-3, clip=0.5), 10)
    state = train.init(jax.tree.map(jnp.copy, variables), tx, jax.random.key(1))
    assert not any("running" in path for path in tree.flat(jax.tree.map(lambda _: 0, state.opt_state)[1][0].mu))
    step = make_step(loss_of(model), tx, microbatches=microbatches)
    state, metrics = step(state, {}, batch)
    # The first norm sees the first convolution of each microbatch, whose statistics are averaged.
    stem = lambda x: np.asarray(
        Conv(4, 7, 2, use_bias=False).apply({"params": variables["params"]["embed"]["conv"]}, x)
    )
    parts = [stem(batch[0][i::microbatches]).reshape(-1, 4) for i in range(microbatches)]
    norm = state.trainable["params"]["embed"]["norm"]
    mean, var = np.mean([x.mean(0) for x in parts], 0), np.mean([x.var(0, ddof=1) for x in parts], 0)
    np.testing.assert_allclose(norm["running_mean"], 0.1 * mean, atol=1e-5)
    np.testing.assert_allclose(norm["running_var"], 0.9 + 0.1 * var, rtol=1e-5)
    if microbatches == 1:
        grads = jax.jit(jax.grad(lambda v: loss_of(model)(v, batch, jax.random.key(0)).loss / 4))(variables)
        np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(optim.weights(grads)), rtol=1e-4)


def test_statistics_follow_where_they_train_and_rest_elsewhere(resnet):
    whole, variables = resnet
    images, key = normal(4, 16, 16, 3) * 5, jax.random.key(0)
    moving = lambda model: {
        path
        for path, x in tree.flat(jax.jit(jax.grad(lambda v: model.learn(v, images, dropout=key)[1]))(variables)).items()
        if np.abs(x).max() > 0
    }
    running = {path for path in tree.flat(variables) if "running" in path}
    assert moving(whole) == running
    assert moving(models.build(RESNET)) == set()
    last = models.build(RESNET, follows=["params/stage1/.*", "params/classifier/.*"])
    assert moving(last) == {path for path in running if "/stage1/" in path}
    # In evaluation, without a key, everything is normalised by what has been averaged.
    resting = models.build(RESNET).features(variables, images)
    np.testing.assert_array_equal(whole.features(variables, images), resting)
    assert np.abs(whole.features(variables, images, dropout=key) - resting).max() > 1e-3


@pytest.mark.parametrize("config", [
    TowerConfig(8, 16, 2, heads=2, image_size=8, patch=4, labels=3),
    RESNET,
    ConvNextConfig((4, 8), (1, 1), labels=3),
])  # fmt: skip
def test_what_a_model_of_images_cannot_do_is_told(config):
    model = models.build(config)
    with pytest.raises(
        ValueError, match=r"pixels have shape \(1, 3, 8, 8\); \[B, H, W, 3\] is expected, channels last"
    ):
        model.features({"params": {}}, jnp.zeros((1, 3, 8, 8)))
    with pytest.raises(ValueError, match="images share no prompt; leave out reads"):
        model.features({"params": {}}, jnp.zeros((1, 8, 8, 3)), reads=1)
    with pytest.raises(ValueError, match="a model of images does not generate"):
        model.cache(1, 2)
    with pytest.raises(ValueError, match="this model of images has no classifier"):
        models.build(type(config)(**{**vars(config), "labels": 0})).output({"params": {}})


@pytest.mark.parametrize(("changes", "message"), [
    ({"heads": 3}, "3 heads cannot share 8 features"),
    ({"activation": "cosine"}, "activation 'cosine' is not known"),
    ({"cls": False}, "pooling 'cls' needs a class token, which this model does not have; take mean"),
    ({"image_size": 2}, "images of 2 pixels have no patch of 4"),
])  # fmt: skip
def test_impossible_towers_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        TowerConfig(**{"width": 8, "mlp_hidden": 16, "layers": 2, "heads": 2, "image_size": 8, "patch": 4, **changes})
