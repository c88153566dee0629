import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsft import models, score
from jaxsft.models import DecoderConfig, build

SHAPE = {"hidden": 16, "mlp_hidden": 24, "layers": 2, "heads": 2, "kv_heads": 1, "head_dim": 8, "max_position": 40}
MODEL = build(DecoderConfig(23, **SHAPE, labels=1, learned_positions=True))  # positions that a shift would change
TEXTS = [[5], [7, 3, 9, 9, 1], [4, 2, 0, 6, 8, 10, 12, 14, 16, 18, 20, 22], [5, 5]]


@pytest.fixture(scope="module")
def variables():
    leaves, form = jax.tree.flatten(jax.eval_shape(MODEL.init, jax.random.key(0)))
    draw = np.random.default_rng(3)
    return {"params": jax.tree.unflatten(form, [jnp.asarray(draw.normal(size=x.shape), jnp.float32) for x in leaves])}


@pytest.fixture(scope="module")
def alone(variables):
    """The score of each text in a row that it fills, at its end."""
    run = jax.jit(lambda tokens: models.scores(variables, MODEL.features(variables, tokens)))
    return [float(run(np.array([text]))[0, -1]) for text in TEXTS]


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_padding_of_any_kind_on_any_side_changes_no_score(variables, alone, side):
    tokens, real = np.full((4, 15), 9, np.int32), np.zeros((4, 15), bool)  # 9 is a token of the texts as well
    for row, here, text in zip(tokens, real, TEXTS, strict=True):
        start = {"left": 15 - len(text), "right": 0, "both": (15 - len(text)) // 2}[side]
        row[start : start + len(text)], here[start : start + len(text)] = text, True
    found = jax.jit(score.rows, static_argnums=0)(MODEL, variables, tokens, real)
    np.testing.assert_allclose(found, alone, atol=1e-4)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_texts_of_any_lengths_score_as_each_alone(variables, alone, batch_size):
    np.testing.assert_allclose(score.texts(MODEL, variables, TEXTS, batch_size=batch_size), alone, atol=1e-4)


def test_no_text_has_no_score(variables):
    assert score.texts(MODEL, variables, []) == []


def test_what_cannot_be_scored_is_refused(variables):
    with pytest.raises(ValueError, match="every text needs at least one token"):
        score.texts(MODEL, variables, [[1], []])
    with pytest.raises(ValueError, match="a text of 41 tokens exceeds the model's 40 positions"):
        score.texts(MODEL, variables, [[1] * 41])
    plain = build(DecoderConfig(23, **SHAPE))
    with pytest.raises(ValueError, match=r"this model predicts tokens and has no score.*labels=1"):
        score.texts(plain, variables, [[1]])
