import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsft.models import POOLINGS, pool, unit

B, T, D = 5, 7, 4
LENGTHS = (7, 1, 4, 2, 6)


def by_loop(tokens: np.ndarray, mode: str, skip: int) -> np.ndarray:
    """One text's vector, token by token."""
    numbered = [(i + 1, x) for i, x in enumerate(tokens)][skip:]
    if not numbered:
        return np.zeros(D)
    if mode in ("cls", "lasttoken"):
        return numbered[0 if mode == "cls" else -1][1]
    if mode == "max":
        return np.array([max(x[d] for _, x in numbered) for d in range(D)])
    total = sum((i if mode == "weightedmean" else 1) * x for i, x in numbered)
    if mode == "weightedmean":
        return total / sum(i for i, _ in numbered)
    return total / (len(numbered) ** 0.5 if mode == "mean_sqrt_len_tokens" else len(numbered))


@pytest.fixture(scope="module")
def pooled():
    """pooled(side, skip) -> every mode's vectors [modes, B, D] of texts padded with NaN on one side, and the texts."""
    compiled = jax.jit(lambda x, real, skip: jnp.stack([pool(x, real, [mode], skip) for mode in POOLINGS]))
    texts = [np.random.default_rng(n).normal(size=(n, D)).astype(np.float32) for n in LENGTHS]

    def run(side: str, skip: int):
        x, real = np.full((B, T, D), np.nan, np.float32), np.zeros((B, T), bool)
        for row, text in enumerate(texts):
            at = slice(0, len(text)) if side == "right" else slice(T - len(text), T)
            x[row, at], real[row, at] = text, True
        return np.asarray(compiled(x, real, skip)), texts

    return run


@pytest.mark.parametrize("skip", [0, 2])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("mode", POOLINGS)
def test_a_pooling_is_that_of_a_loop_whatever_the_padding_holds(pooled, mode, side, skip):
    vectors, texts = pooled(side, skip)
    expected = np.stack([by_loop(text, mode, skip) for text in texts])
    np.testing.assert_allclose(vectors[POOLINGS.index(mode)], expected, atol=1e-6)


def test_modes_stand_one_behind_the_other_and_an_unknown_one_is_named():
    x, real = jnp.ones((1, 2, 3), jnp.bfloat16), jnp.array([[True, False]])
    found = pool(x, real, ["cls", "mean_sqrt_len_tokens"])
    assert (found.shape, found.dtype) == ((1, 6), jnp.float32)
    with pytest.raises(ValueError, match="pooling 'last' is not known; known are cls, max"):
        pool(x, real, ["last"])


def test_a_unit_vector_has_length_1_and_zeros_have_no_gradient_that_is_not_finite():
    x = jnp.array([[3.0, 4.0], [0.0, 0.0]])
    np.testing.assert_allclose(np.linalg.norm(unit(x), axis=1), [1, 0], atol=1e-6)
    assert np.isfinite(jax.grad(lambda x: unit(x)[:, 0].sum())(x)).all()
