import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsft import losses, quant

B, T, D, V = 3, 7, 5, 11
MASKS = {
    "all": np.ones((B, T), bool),
    "ragged": np.array([[1, 0, 1, 1, 0, 0, 1], [0, 1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0, 0]], bool),
    "an empty row": np.array([[0, 1, 1, 0, 1, 0, 0], [0] * 7, [1, 0, 0, 0, 0, 0, 1]], bool),
    "nothing": np.zeros((B, T), bool),
}


def arrays(dtype=jnp.float32):
    """(features, table, targets, weights of each token's log-probability)."""
    draw = np.random.default_rng(0)
    features, table = draw.normal(size=(B, T, D)), 2 * draw.normal(size=(V, D))
    targets, weights = draw.integers(0, V, (B, T)), draw.normal(size=(B, T))
    return jnp.asarray(features, dtype), jnp.asarray(table, jnp.float32), jnp.asarray(targets), jnp.asarray(weights)


def reference(features, table, targets, mask):
    """With the whole [B, T, V] array."""
    every = jax.nn.log_softmax(features.astype(jnp.float32) @ table.T, axis=-1)
    return jnp.where(mask, jnp.take_along_axis(every, targets[..., None], axis=-1)[..., 0], 0.0)


@functools.partial(jax.jit, static_argnums=(0, 1))
def pull(trains, chunk, features, table, targets, mask, weights):
    """(lp, gradients of the weighted sum of lp) with the code under test, or the reference where chunk is None."""
    lp = reference if chunk is None else functools.partial(losses.logprobs, chunk=losses.Chunk(*chunk))
    given = {"features": features, "table": table}
    total = lambda learned: (lp(**(given | learned), targets=targets, mask=mask) * weights).sum()
    return lp(features, table, targets, mask), jax.grad(total)({name: given[name] for name in trains})


@pytest.mark.parametrize("seed", range(4))
def test_shift_pairs_each_token_with_the_next_of_its_document(seed):
    draw = np.random.default_rng(seed)
    tokens, mask = draw.integers(1, 99, (4, 12)), draw.integers(0, 2, (4, 12)).astype(bool)
    segments = np.sort(draw.integers(1, 4, (4, 12)), axis=1)
    segments[:, 12 - seed :] = 0
    mask &= segments > 0
    targets, learned = losses.shift(jnp.asarray(tokens), jnp.asarray(mask), jnp.asarray(segments))
    count = 0
    for b in range(4):
        for t in range(12):
            follows = t + 1 < 12 and segments[b, t] == segments[b, t + 1] > 0
            assert bool(learned[b, t]) == bool(follows and mask[b, t + 1])
            if follows:
                assert targets[b, t] == tokens[b, t + 1]
            count += bool(follows and mask[b, t + 1])
    assert int(learned.sum()) == count


def test_a_documents_first_token_and_padding_are_never_learned():
    segments = jnp.array([[1, 1, 2, 3, 0, 0]])
    learned = losses.shift(jnp.arange(6)[None], jnp.ones((1, 6), bool), segments)[1]
    assert learned.astype(int).tolist() == [[1, 0, 0, 0, 0, 0]]


@pytest.mark.parametrize("trains", [("features",), ("features", "table"), ("table",)])
@pytest.mark.parametrize("chunk", [(1, 3), (6, 4), (9, 11), (1000, 1000)])
def test_values_and_gradients_equal_those_of_log_softmax(trains, chunk):
    features, table, targets, weights = arrays()
    for mask in MASKS.values():
        given = features, table, targets, jnp.asarray(mask), weights
        (lp, grads), (expected, slopes) = pull(trains, chunk, *given), pull(trains, None, *given)
        np.testing.assert_allclose(lp, expected, atol=2e-6)
        assert not np.any(np.asarray(lp)[~mask])
        for name in trains:
            np.testing.assert_allclose(grads[name], slopes[name], atol=1e-5)


def test_a_row_without_learned_tokens_gives_zero_and_no_nan():
    features, table, targets, weights = arrays()
    features = features.at[1].set(jnp.inf)  # what a masked row holds must not matter
    lp, grads = pull(
        ("features", "table"), (6, 4), features, table, targets, jnp.asarray(MASKS["an empty row"]), weights
    )
    assert np.all(np.isfinite(lp))
    assert not np.any(lp[1])
    assert not np.any(grads["features"][1])
    assert np.all(np.isfinite(grads["table"]))


def test_bfloat16_features_have_float32_log_probabilities():
    features, table, targets, weights = arrays(jnp.bfloat16)
    mask = jnp.asarray(MASKS["ragged"])
    rounded = table.astype(jnp.bfloat16).astype(jnp.float32)
    given = targets, mask, weights
    for trains in (("features",), ("features", "table")):
        lp, grads = pull(trains, (6, 4), features, table, *given)
        expected, slopes = pull(trains, None, features, rounded, *given)
        assert lp.dtype == jnp.float32
        np.testing.assert_allclose(lp, expected, atol=1e-5)  # products of bfloat16 are exact in float32
        for name in trains:
            assert grads[name].dtype == (jnp.bfloat16 if name == "features" else jnp.float32)
            np.testing.assert_allclose(grads[name].astype(jnp.float32), slopes[name], rtol=0.03, atol=0.03)


def test_large_logits_neither_overflow_nor_lose_the_target():
    features, table = jnp.full((1, 2, 1), 1e4), jnp.array([[1.0], [0.0], [-1.0]])
    lp = losses.logprobs(features, table, jnp.array([[0, 2]]), jnp.ones((1, 2), bool))
    np.testing.assert_allclose(lp, [[0.0, -2e4]])


@pytest.mark.parametrize(
    ("found", "trains"),
    [
        (losses.logprobs, (0,)),
        (losses.logprobs, (0, 1)),
        (lambda *given, chunk: sum(losses.entropies(*given, chunk=chunk)), (0,)),
    ],
)
def test_no_buffer_grows_with_tokens_times_vocabulary(found, trains):
    vocabulary, width, chunk = 32_000, 8, losses.Chunk(32, 32_000)

    def temporary(length):
        shapes = [
            jax.ShapeDtypeStruct(shape, dtype)
            for shape, dtype in [
                ((2, length, width), jnp.float32),
                ((vocabulary, width), jnp.float32),
                ((2, length), jnp.int32),
                ((2, length), jnp.bool_),
            ]
        ]
        total = lambda *given: found(*given, chunk=chunk).sum()
        return jax.jit(jax.grad(total, trains)).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    short, long = temporary(256), temporary(1024)
    whole = 2 * 1024 * vocabulary * 4
    assert long < whole / 10
    assert long - short < 2 * (1024 - 256) * width * 4 * 20  # what grows is the size of the features


@pytest.mark.parametrize("learned", [False, True])
def test_over_a_frozen_table_memory_does_not_grow_with_the_vocabulary(learned):
    def temporary(vocabulary):
        shapes = [((2, 128, 8), jnp.float32), ((vocabulary, 8), jnp.float32), ((2, 128), jnp.int32)]
        given = [jax.ShapeDtypeStruct(*shape) for shape in [*shapes, ((2, 128), jnp.bool_)]]
        found = lambda *given: losses.entropies(*given, chunk=losses.Chunk(32, 4096), learned=learned)
        total = lambda *given: sum(x.sum() for x in found(*given))
        return jax.jit(jax.grad(total)).lower(*given).compile().memory_analysis().temp_size_in_bytes

    small, large = temporary(2 * 4096), temporary(16 * 4096)
    assert large < 1.1 * small < 20 * 32 * 4096 * 4


def test_the_loss_sums_to_the_negative_log_likelihood_of_the_learned_tokens():
    features, table, targets, _ = arrays()
    mask = MASKS["ragged"]
    lp = losses.logprobs(features, table, targets, jnp.asarray(mask))
    loss = losses.sft(lp, jnp.asarray(mask))
    total = 0.0
    for b, t in zip(*np.nonzero(mask), strict=True):
        scores = np.asarray(features, np.float64)[b, t] @ np.asarray(table, np.float64).T
        total -= scores[targets[b, t]] - np.log(np.exp(scores).sum())
    np.testing.assert_allclose(loss.sum(), total, rtol=1e-6)
    assert loss.shape == (B, T)
    assert not np.any(np.asarray(loss)[~mask])


def test_the_loss_ignores_what_is_not_learned_even_if_it_is_not_finite():
    loss = losses.sft(jnp.array([[-1.0, -jnp.inf, jnp.nan]]), jnp.array([[True, False, False]]))
    assert loss.tolist() == [[1.0, 0.0, 0.0]]


@pytest.mark.parametrize(("scale", "soft_cap"), [(0.25, None), (1.0, 2.0), (3.0, 1.5)])
@pytest.mark.parametrize("trains", [("features",), ("table",), ("features", "table")])
def test_scaled_and_capped_scores_have_the_values_and_gradients_of_the_whole_array(scale, soft_cap, trains):
    features, table, targets, weights = arrays()
    mask = jnp.asarray(MASKS["ragged"])

    def whole(features, table):
        scores = scale * features @ table.T
        scores = scores if soft_cap is None else soft_cap * jnp.tanh(scores / soft_cap)
        every = jax.nn.log_softmax(scores, axis=-1)
        return jnp.where(mask, jnp.take_along_axis(every, targets[..., None], axis=-1)[..., 0], 0.0)

    def ours(features, table):
        return losses.logprobs(features, table, targets, mask, scale=scale, soft_cap=soft_cap, chunk=losses.Chunk(6, 4))

    given = {"features": features, "table": table}
    np.testing.assert_allclose(ours(**given), whole(**given), atol=2e-6)
    pulls = []
    for lp in (ours, whole):
        total = lambda learned, lp=lp: (lp(**(given | learned)) * weights).sum()
        pulls.append(jax.jit(jax.grad(total))({name: given[name] for name in trains}))
    for name in trains:
        np.testing.assert_allclose(pulls[0][name], pulls[1][name], rtol=5e-6, atol=5e-6)
        assert float(jnp.abs(pulls[0][name]).max()) > 1e-2


def plain(features, table, targets, mask, *, scale=1.0, soft_cap=None, temperature=1.0):
    """(lp, entropy) with the whole [B, T, V] array."""
    scores = scale * features @ table.T
    scores = scores if soft_cap is None else soft_cap * jnp.tanh(scores / soft_cap)
    every = jax.nn.log_softmax(scores / temperature, axis=-1)
    lp = jnp.take_along_axis(every, targets[..., None], axis=-1)[..., 0]
    return jnp.where(mask, lp, 0.0), jnp.where(mask, -(jnp.exp(every) * every).sum(axis=-1), 0.0)


BENT = [{}, {"temperature": 0.7}, {"scale": 3.0, "soft_cap": 1.5, "temperature": 2.0}]


@pytest.mark.parametrize("bent", BENT, ids=str)
@pytest.mark.parametrize("trains", [("features",), ("table",), ("features", "table")])
def test_entropies_and_their_gradients_are_those_of_the_whole_array(trains, bent):
    features, table, targets, weights = arrays()
    mask = jnp.asarray(MASKS["an empty row"])
    bad = jnp.where(mask[..., None], features, jnp.nan)  # what a masked token holds must not matter

    def total(learned, found, features):
        given = {"features": features, "table": table} | learned
        lp, entropy = found(**given, targets=targets, mask=mask, **bent)
        return (lp * weights + 3 * entropy * weights[::-1]).sum(), (lp, entropy)

    grad = lambda found, features: jax.jit(jax.grad(lambda learned: total(learned, found, features), has_aux=True))(
        {name: {"features": features, "table": table}[name] for name in trains}
    )
    ours, (lp, entropy) = grad(functools.partial(losses.entropies, chunk=losses.Chunk(6, 4)), bad)
    theirs, expected = grad(plain, features)
    np.testing.assert_allclose(lp, expected[0], atol=2e-6)
    np.testing.assert_allclose(entropy, expected[1], atol=2e-6)
    for name in trains:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-5, atol=1e-5)
        assert float(jnp.abs(ours[name]).max()) > 1e-2


@pytest.mark.parametrize("trains", [("features",), ("features", "table")])
def test_an_entropy_that_is_only_shown_has_no_gradient_and_does_not_change_that_of_the_log_probability(trains):
    features, table, targets, weights = arrays()
    mask, given = jnp.asarray(MASKS["ragged"]), {"features": features, "table": table}

    def total(learned, entropy):
        lp, spread = losses.entropies(
            **(given | learned), targets=targets, mask=mask, chunk=losses.Chunk(6, 4), learned=False
        )
        return (lp * weights).sum() + entropy * spread.sum(), spread

    learned = {name: given[name] for name in trains}
    slopes, spread = jax.jit(jax.grad(total, has_aux=True))(learned, 3.0)
    expected = pull(trains, (6, 4), features, table, targets, mask, weights)[1]
    np.testing.assert_allclose(spread, plain(features, table, targets, mask)[1], atol=2e-6)
    for name in trains:
        np.testing.assert_allclose(slopes[name], expected[name], atol=5e-6)


def test_a_table_that_makes_the_features_as_well_gets_both_gradients():
    _, table, targets, weights = arrays()
    mask, tokens = jnp.asarray(MASKS["ragged"]), targets[:, ::-1]
    total = lambda found: (
        lambda table: sum((x * weights).sum() for x in found(table[tokens] / 2, table, targets, mask, temperature=0.7))
    )
    ours, theirs = (jax.jit(jax.grad(total(found)))(table) for found in (losses.entropies, plain))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_the_entropy_is_never_negative_and_largest_where_all_is_as_likely():
    features, table = jnp.array([[[0.0], [1.0], [1e4], [-1e4]]]), jnp.array([[1.0], [1.0 - 1e-7], [0.0], [-1.0]])
    entropy = losses.entropies(features, table, jnp.zeros((1, 4), int), jnp.ones((1, 4), bool))[1]
    assert (np.asarray(entropy) >= 0).all()
    np.testing.assert_allclose(entropy[0, 0], np.log(4), rtol=1e-6)
    np.testing.assert_allclose(entropy[0, 3], 0.0, atol=1e-6)


def test_a_temperature_is_that_of_a_softmax_over_divided_scores():
    features, table, targets, _ = arrays()
    mask = jnp.asarray(MASKS["ragged"])
    lp = losses.logprobs(features, table, targets, mask, temperature=0.5)
    np.testing.assert_allclose(lp, plain(features, 2 * table, targets, mask)[0], atol=2e-6)


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_a_temperature_that_nothing_can_be_divided_by_raises(temperature):
    features, table, targets, _ = arrays()
    for found in (losses.logprobs, losses.entropies):
        with pytest.raises(ValueError, match=f"temperature is {temperature}.*above 0"):
            found(features, table, targets, jnp.asarray(MASKS["all"]), temperature=temperature)


CHUNK = losses.Chunk(6, 4)


def test_the_most_likely_token_is_that_of_the_whole_array_and_the_first_of_several():
    features, table, targets, _ = arrays()
    table = table.at[9].set(table[2])  # in another block
    mask = jnp.asarray(MASKS["an empty row"])
    lp, best = losses.top1(features, table, targets, mask, chunk=CHUNK)
    every = np.asarray(features) @ np.asarray(table).T
    every[..., 9] = every[..., 2]
    np.testing.assert_array_equal(best, np.where(mask, every.argmax(axis=-1), 0))
    assert {2} <= set(np.asarray(best)[mask].tolist())
    np.testing.assert_allclose(lp, reference(features, table, targets, mask), atol=2e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_packed_table_is_what_it_stands_for(dtype):
    features, table, targets, weights = arrays(dtype)
    mask, packed = jnp.asarray(MASKS["ragged"]), quant.pack(table.T, "int8")
    given = {"mask": mask, "targets": targets, "chunk": CHUNK, "temperature": 0.7}

    @jax.jit
    def pulled(features, table):
        total = lambda f: sum((x * weights).sum() for x in losses.entropies(f, table, **given))
        alone = lambda f: (losses.logprobs(f, table, **given) * weights).sum()
        return jax.value_and_grad(total)(features), jax.value_and_grad(alone)(features)

    ours, theirs = pulled(features, packed), pulled(features, quant.unpack(packed).T)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), *_full(ours, theirs))
    assert float(jnp.abs(ours[1][1]).max()) > 1e-2


def _full(*trees):
    return jax.tree.map(lambda x: x.astype(jnp.float32), trees)


def test_where_a_token_is_nearly_certain_bfloat16_has_its_small_gradient():
    draw = np.random.default_rng(2)
    features = jnp.asarray(draw.normal(size=(1, 4, 64)), jnp.bfloat16)
    table = jnp.asarray(draw.normal(size=(40, 64)) / 8, jnp.float32)  # frozen, and in float32
    table = table.at[:4].set(features[0].astype(jnp.float32) / 8)  # scores of about 8
    targets, mask = jnp.arange(4)[None], jnp.ones((1, 4), bool)
    grad = lambda table, lp: jax.jit(jax.grad(lambda f: lp(f, table, targets, mask).sum()))
    ours = grad(table, functools.partial(losses.logprobs, chunk=CHUNK))(features)
    rounded = table.astype(jnp.bfloat16).astype(jnp.float32)
    theirs = grad(rounded, reference)(features.astype(jnp.float32))
    assert float(jnp.abs(theirs).max()) < 0.05
    np.testing.assert_allclose(ours.astype(jnp.float32), theirs, rtol=0.02, atol=1e-5)
