import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsft.losses import Chunk, collision, ld_weights, logprobs, wpo

B, T, D, V = 3, 7, 5, 11
MASKS = [
    np.ones((B, T), bool),
    np.array([[0, 1, 1, 0, 1, 0, 0], [0] * 7, [1, 0, 0, 0, 0, 0, 1]], bool),
    np.zeros((B, T), bool),
]


@pytest.fixture(scope="module")
def arrays():
    random = np.random.default_rng(0)
    return random.normal(size=(B, T, D)).astype(np.float32), 2 * random.normal(size=(V, D)).astype(np.float32)


@pytest.mark.parametrize(("scale", "soft_cap"), [(1.0, None), (0.3, 2.0)])
@pytest.mark.parametrize("chunk", [(1, 3), (6, 4), (1000, 1000)])
def test_collision_is_the_log_of_the_sum_of_squared_probabilities(chunk, scale, soft_cap, arrays):
    features, table = arrays
    logits = scale * features.astype(np.float64) @ table.T
    logits = logits if soft_cap is None else soft_cap * np.tanh(logits / soft_cap)
    p = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    for mask in MASKS:
        found = collision(features, table, jnp.asarray(mask), scale=scale, soft_cap=soft_cap, chunk=Chunk(*chunk))
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, np.where(mask, np.log((p**2).sum(axis=-1)), 0), atol=2e-6)


def test_collision_has_no_gradient_and_what_a_masked_token_holds_does_not_matter(arrays):
    features, table = arrays
    mask = MASKS[1]
    bad = jnp.asarray(np.where(mask[..., None], features, np.nan))
    total = lambda features, table: collision(features, table, jnp.asarray(mask)).sum()
    value, slopes = jax.value_and_grad(total, (0, 1))(bad, table)
    assert float(value) == pytest.approx(float(total(features, table)), rel=1e-6)
    assert not any(np.asarray(slope).any() for slope in slopes)


def test_no_buffer_of_collision_grows_with_tokens_times_vocabulary():
    vocabulary = 32_000

    def temporary(length):
        shapes = [((2, length, 8), jnp.float32), ((vocabulary, 8), jnp.float32), ((2, length), jnp.bool_)]
        given = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
        compiled = jax.jit(lambda *given: collision(*given, chunk=Chunk(32, 4096))).lower(*given).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short, long = temporary(256), temporary(1024)
    assert long < 2 * 1024 * vocabulary * 4 / 10
    assert long - short < 2 * (1024 - 256) * 8 * 4 * 20


def test_a_weight_is_the_mean_over_tokens_of_probability_against_what_was_to_be_expected(arrays):
    features, table = arrays
    mask, targets = jnp.asarray(MASKS[1]), jnp.arange(B * T).reshape(B, T) % V
    lp = logprobs(features, table, targets, mask)
    weights = wpo(*(x.sum(axis=1) for x in (lp, collision(features, table, mask), mask)))
    for b in range(B):
        parts = []
        for t in np.flatnonzero(MASKS[1][b]):
            p = np.exp(features[b, t] @ table.T)
            p /= p.sum()
            parts.append(np.log(p[int(targets[b, t])]) - np.log((p**2).sum()))
        assert float(weights[b]) == pytest.approx(np.exp(np.mean(parts)) if parts else 1.0, rel=1e-5)


def test_a_weight_has_no_gradient():
    lp, count = jnp.full(2, -1.0), jnp.full(2, 3.0)
    assert not np.asarray(jax.grad(lambda lp: wpo(lp, jnp.zeros(2), count).sum())(lp)).any()


def test_tokens_behind_the_shorter_answer_count_alpha():
    weights = ld_weights(jnp.tile(jnp.arange(4), (3, 1)), jnp.array([[0], [2], [9]]), 0.25)
    assert weights.tolist() == [[0.25] * 4, [1, 1, 0.25, 0.25], [1] * 4]
    assert weights.dtype == jnp.float32


@pytest.mark.parametrize("alpha", [-0.1, 1.1])
def test_an_alpha_beyond_its_bounds_is_refused(alpha):
    with pytest.raises(ValueError, match=f"alpha is {alpha}; LD-DPO's is between 0"):
        ld_weights(jnp.zeros((1, 1), int), jnp.ones(1, int), alpha)
