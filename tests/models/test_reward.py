import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsft import models, tree
from jaxsft.models import DecoderConfig


def test_a_score_is_the_product_of_features_and_weights_in_float32():
    draw = np.random.default_rng(0)
    features, kernel = draw.normal(size=(2, 5, 16)), draw.normal(size=(16, 1))
    for dtype, tolerance in ((jnp.float32, 1e-5), (jnp.bfloat16, 1e-5)):  # no sum is rounded to the features' dtype
        x = jnp.asarray(features, dtype)
        expected = [
            [sum(a * b for a, b in zip(map(float, token), kernel[:, 0], strict=True)) for token in row] for row in x
        ]
        found = models.scores({"params": {"score": {"kernel": jnp.asarray(kernel, jnp.float32)}}}, x)
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, expected, atol=tolerance)


@pytest.mark.parametrize("seed", range(3))
def test_the_last_value_is_that_of_a_plain_loop_wherever_padding_is(seed):
    draw = np.random.default_rng(seed)
    values, segments = draw.normal(size=(40, 6)).astype(np.float32), draw.integers(0, 2, (40, 6)) * draw.integers(1, 4)
    segments[0], segments[1] = 0, 1
    expected = []
    for row, here in zip(values, segments, strict=True):
        real = [value for value, segment in zip(row, here, strict=True) if segment > 0]
        expected.append(real[-1] if real else 0.0)
    np.testing.assert_array_equal(models.last(jnp.asarray(values), jnp.asarray(segments)), expected)


def test_padding_gets_no_gradient_of_the_last_value():
    segments = jnp.array([[1, 1, 0], [0, 1, 1], [0, 0, 0]])
    grad = jax.grad(lambda values: models.last(values, segments).sum())(jnp.ones((3, 3)))
    np.testing.assert_array_equal(grad, [[0, 1, 0], [0, 0, 1], [0, 0, 0]])


def test_a_fresh_reward_model_is_the_fresh_language_model_with_a_score_for_its_head():
    wide = {"hidden": 2000, "mlp_hidden": 8, "layers": 1, "heads": 1, "kv_heads": 1, "head_dim": 8, "max_position": 64}
    make = lambda **more: jax.jit(models.build(DecoderConfig(23, **wide, **more)).init)(jax.random.key(3))
    plain, judge = make(), make(labels=1)
    assert set(plain) - {"head"} == set(judge) - {"score"} == {"embed", "blocks", "norm"}
    leaves = tree.flat(plain)
    assert all(np.array_equal(x, leaves[path]) for path, x in tree.flat(judge).items() if path != "score/kernel")
    assert judge["score"]["kernel"].shape == (2000, 1)
    assert abs(float(judge["score"]["kernel"].std()) - 0.02) < 0.001  # transformers' initializer_range
