import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsft import lora, losses, objectives, sharding, tree
from jaxsft.models import EncoderConfig, build, pool, unit
from jaxsft.types import Contrasts

CONFIG = EncoderConfig(24, 8, 16, 2, heads=2, max_position=16, mlm=False)
B, P, SCALE = 8, 2, 3.0


def batch(seed=0) -> Contrasts:
    draw = np.random.default_rng(seed)
    made = Contrasts(
        queries=draw.integers(1, 24, (B, 5)),
        query_sizes=draw.integers(1, 6, (B, 1)),
        passages=draw.integers(1, 24, (B, P, 9)),
        passage_sizes=draw.integers(1, 10, (B, P)),
        texts=np.arange(B * P).reshape(B, P),
    )
    made.texts[5] = -1  # only fills the batch
    made.query_sizes[5] = made.passage_sizes[5] = 0
    made.texts[2, 1] = -1
    return Contrasts(*(jnp.asarray(x, jnp.int32) for x in made))


@pytest.fixture(scope="module")
def learner():
    model = build(CONFIG, lora_dropout=0.3)
    params = jax.tree.map(lambda x: 2 * x, model.init(jax.random.key(0)))
    adapter = lora.init(jax.random.key(1), params, lora.LoRA(rank=2))
    adapter = jax.tree.map(lambda x: x + 0.1, adapter)
    return model, tree.partition({"params": params, "lora": adapter}, lora.TRAINABLE)


def mean(features, real):
    return unit(pool(features, real))


@pytest.fixture(scope="module")
def gradient(learner):
    """gradient(pieces, key, trainable) -> ((loss, sums), slopes) of the batch."""
    model, (start, frozen) = learner

    @functools.cache
    def compiled(pieces):
        objective = objectives.contrastive(model, mean, scale=SCALE, pieces=pieces)

        def total(trainable, batch, key):
            sums = objective(tree.combine(trainable, frozen), batch, key)
            return sums.loss, sums

        return jax.jit(jax.value_and_grad(total, has_aux=True))

    return lambda pieces, key=None, trainable=start: compiled(pieces)(trainable, batch(), key)


def test_the_loss_is_that_of_each_text_embedded_alone(learner, gradient):
    model, (trainable, frozen) = learner
    given, variables = batch(), tree.combine(trainable, frozen)
    features = jax.jit(lambda tokens, segments: model.features(variables, tokens, None, segments))

    def alone(tokens, sizes):
        segments = (np.arange(tokens.shape[1]) < np.asarray(sizes)[:, None]).astype(np.int32)
        full = np.asarray(features(tokens, segments))
        made = [x[:n].mean(axis=0) if n else np.zeros(8) for x, n in zip(full, sizes.tolist(), strict=True)]
        return np.stack([x / max(np.linalg.norm(x), 1e-12) for x in made])

    queries = alone(given.queries, given.query_sizes[:, 0])
    passages = alone(given.passages.reshape(B * P, -1), given.passage_sizes.reshape(-1)).reshape(B, P, -1)
    loss, metrics = losses.contrastive(queries, passages[:, 0], passages[:, 1:], scale=SCALE, texts=given.texts)
    (found, sums), _ = gradient(1)
    assert float(found) == pytest.approx(float(loss.sum()), rel=1e-5)
    assert float(sums.weight) == B - 1
    for name, value in metrics.items():
        assert float(sums.metrics[name]) == pytest.approx(float(value.sum()), rel=1e-4, abs=1e-5)


def test_in_pieces_loss_and_gradient_are_those_of_the_whole(gradient):
    (whole, _), slopes = gradient(1)
    (pieces, sums), found = gradient(4)
    assert float(pieces) == pytest.approx(float(whole), rel=1e-6)
    assert float(sums.weight) == B - 1
    largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(slopes))
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(slopes), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-6 * largest)


def test_a_piece_is_computed_again_with_the_same_dropout(learner, gradient):
    """Slopes of the pieces' loss along a direction, by differences of the loss itself, whose dropout is one draw."""
    (start, _), key = learner[1], jax.random.key(3)
    (here, _), slopes = gradient(4, key)
    assert abs(float(here - gradient(4, jax.random.key(4))[0][0])) > 1e-3
    size = float(jnp.sqrt(sum((x**2).sum() for x in jax.tree.leaves(slopes))))
    at = lambda h: float(gradient(4, key, jax.tree.map(lambda x, g: x + h * g / size, start, slopes))[0][0])
    h = 1e-3
    assert (at(h) - at(-h)) / (2 * h) == pytest.approx(size, rel=1e-2)


def test_a_batch_is_cut_and_joined_in_order():
    given = batch()
    again = sharding.join(sharding.cut(given, 4))
    assert all((x == y).all() for x, y in zip(again, given, strict=True))
