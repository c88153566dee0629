import jax
import jax.numpy as jnp
import numpy as np

import jaxsft
from jaxsft import losses, models, objectives, sharding
from jaxsft.models import DecoderConfig

CONFIG = DecoderConfig(32, 8, 16, 2, heads=2, kv_heads=1, head_dim=4, max_position=64, logit_scale=0.5)


def test_the_accuracy_of_an_evaluation_is_the_share_of_learned_tokens_that_the_model_finds_the_most_likely():
    model = models.build(CONFIG)
    variables = {"params": jax.tree.map(lambda x: 9 * x, model.init(jax.random.key(0)))}
    tokens = jax.random.randint(jax.random.key(1), (3, 10), 0, 32)
    ones = jnp.ones_like(tokens)
    positions = jnp.arange(10) * ones
    scores = np.asarray(models.logits(model, variables, model.features(variables, tokens)))
    # Some tokens are replaced by what the model would have said; being causal, it says the same before them.
    tokens = tokens.at[:, -1].set(scores[:, -2].argmax(axis=-1))
    mask = jax.random.bernoulli(jax.random.key(2), 0.6, tokens.shape).at[:2, -1].set(True)
    batch = jaxsft.Tokens(tokens, mask, positions, ones)
    sums = jax.jit(lambda batch: objectives.supervised(model)(variables, batch, None))(batch)
    loss, right, count = 0.0, 0, 0
    for b, t in zip(*np.nonzero(np.asarray(mask)[:, 1:]), strict=True):
        row = scores[b, t].astype(np.float64)
        loss -= row[tokens[b, t + 1]] - np.log(np.exp(row).sum())
        right, count = right + (row.argmax() == int(tokens[b, t + 1])), count + 1
    np.testing.assert_allclose(sums.loss, loss, rtol=1e-5)
    assert (float(sums.metrics["accuracy"]), float(sums.weight)) == (right, count)
    assert 2 <= right < count


def test_in_training_nothing_is_computed_for_people():
    model = models.build(CONFIG)
    ones = jnp.ones((1, 4), jnp.int32)
    batch = jaxsft.Tokens(ones, ones > 0, ones, ones)
    given = {"params": jax.eval_shape(model.init, jax.random.key(0))}, batch, jax.random.key(0)
    assert jax.eval_shape(objectives.supervised(model), *given).metrics == {}


def test_where_and_how_a_model_makes_scores_is_told_in_one_place():
    mesh = sharding.mesh(devices=jax.devices()[:1])
    chunk = losses.Chunk(8, 16)
    found = objectives.head_of(models.build(CONFIG, mesh=mesh), chunk)
    assert found == {"scale": 0.5, "soft_cap": None, "chunk": chunk, "mesh": mesh}
