import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsft.models import adapter

TOKENS, IN, OUT, RANK = 5, 6, 4, 2
KINDS = ["lora", "pissa", "dora", "pissa-dora"]


def leaves_of(kind, seed=0, n_in=IN, n_out=OUT, stack=()):
    draw = np.random.default_rng(seed)
    shapes = {"a": (n_in, RANK), "b": (RANK, n_out)}
    if "pissa" in kind:
        shapes |= {"a0": (n_in, RANK), "b0": (RANK, n_out)}
    if "dora" in kind:
        shapes |= {"m": (n_out,)}
    made = {name: draw.normal(size=(*stack, *shape)) for name, shape in shapes.items()}
    made["scale"] = np.full(stack, 1.5)
    return {name: jnp.asarray(x, jnp.float32) for name, x in made.items()}


def weight(kernel, leaves):
    """W' by the papers' formulas, column by column, in float64: y = x W'."""
    leaf = {name: np.asarray(x, np.float64) for name, x in leaves.items()}
    full = np.asarray(kernel, np.float64) + leaf["scale"] * leaf["a"] @ leaf["b"]
    full -= leaf["scale"] * leaf["a0"] @ leaf["b0"] if "a0" in leaf else 0
    for column in range(full.shape[1] if "m" in leaf else 0):
        full[:, column] *= leaf["m"][column] / np.sqrt(sum(full[:, column] ** 2))
    return full


def draw(*shape, seed=9):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_with_an_adapter_multiplies_by_the_adapted_kernel(kind):
    x, kernel, leaves = draw(TOKENS, IN), draw(IN, OUT, seed=1), leaves_of(kind)
    np.testing.assert_allclose(adapter.project(x, kernel, leaves), x @ weight(kernel, leaves), atol=1e-5)
    np.testing.assert_array_equal(adapter.project(x, kernel, {}), x @ kernel)


@pytest.mark.parametrize("kind", KINDS)
def test_a_stack_of_kernels_is_as_many_layers(kind):
    """Experts, say: an axis in front of W, A, B, scale and m, and of the inputs."""
    x, kernel, leaves = draw(3, TOKENS, IN), draw(3, IN, OUT, seed=1), leaves_of(kind, stack=(3,))
    together = adapter.project(x, kernel, leaves)
    for i in range(3):
        alone = adapter.project(x[i], kernel[i], {name: leaf[i] for name, leaf in leaves.items()})
        np.testing.assert_allclose(together[i], alone, atol=1e-5)


@pytest.mark.parametrize("kind", ["dora", "pissa-dora"])
def test_doras_norm_is_a_constant_of_the_gradient(kind):
    """Section 4.3: the gradients of y = (m / C) x W' with C the norm's value, from the chain rule by hand."""
    x, kernel, leaves, g = draw(TOKENS, IN), draw(IN, OUT, seed=1), leaves_of(kind), draw(TOKENS, OUT, seed=2)
    found = jax.grad(lambda low: (adapter.project(x, kernel, leaves | low) * g).sum())(
        {name: leaves[name] for name in ("a", "b", "m")}
    )
    a, b, s = (np.asarray(leaves[name], np.float64) for name in ("a", "b", "scale"))
    plain = weight(kernel, {name: leaf for name, leaf in leaves.items() if name != "m"})
    norm = np.sqrt((plain**2).sum(0))
    pull = np.asarray(g) * (np.asarray(leaves["m"]) / norm)
    np.testing.assert_allclose(found["a"], s * np.asarray(x).T @ pull @ b.T, atol=1e-4)
    np.testing.assert_allclose(found["b"], s * a.T @ np.asarray(x).T @ pull, atol=1e-4)
    np.testing.assert_allclose(found["m"], ((x @ plain) * g).sum(0) / norm, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_is_pefts_and_keeps_the_mean(kind):
    x, kernel, leaves = draw(1, 4), draw(4, OUT, seed=1), leaves_of(kind, n_in=4)
    leaf = {name: np.asarray(x, np.float64) for name, x in leaves.items()}
    own = np.asarray(kernel, np.float64)
    own = own - leaf["scale"] * leaf["a0"] @ leaf["b0"] if "pissa" in kind else own
    low = leaf["scale"] * leaf["a"] @ leaf["b"]
    found = []
    for keep in itertools.product([0.0, 2.0], repeat=4):  # every mask of a rate of one half
        dropped = np.asarray(x, np.float64) * keep
        y = adapter.project(x, kernel, leaves, lambda x, keep=keep: x * jnp.array(keep))
        expected = x @ own + dropped @ low
        if "dora" in kind:  # peft/tuners/lora/dora.py: result + (m / norm - 1) dropped W + m / norm dropped B A
            factor = leaf["m"] / np.sqrt(((own + low) ** 2).sum(0))
            expected = x @ own + (factor - 1) * (dropped @ own) + factor * (dropped @ low)
        np.testing.assert_allclose(y, expected, atol=1e-4)
        found.append(y)
    np.testing.assert_allclose(np.mean(found, axis=0), adapter.project(x, kernel, leaves), atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_layers_of_one_input_share_the_product_with_their_a(kind):
    x, kernel = draw(TOKENS, IN), draw(IN, OUT, seed=1)
    lora = {"q": leaves_of(kind), "k": leaves_of("lora", seed=3, n_out=3)}
    lora["k"]["a"] = lora["k"]["a"][:, :1]  # of another rank
    program = jax.make_jaxpr(lambda x: adapter.inners(x, lora))(x)
    assert [one.primitive.name for one in program.eqns].count("dot_general") == 1
    inners = adapter.inners(x, lora)
    np.testing.assert_allclose(inners["k"], x @ lora["k"]["a"], rtol=1e-5)
    shared = adapter.project(x, kernel, lora["q"], inner=inners["q"])
    np.testing.assert_allclose(shared, adapter.project(x, kernel, lora["q"]), rtol=2e-5, atol=1e-6)


def test_dropout_needs_a_rate_and_a_key():
    key = jax.random.key(0)
    assert adapter.dropout(0.0, key) is None
    assert adapter.dropout(0.5, None) is None
    x = jnp.ones((100, 100))
    dropped = adapter.dropout(0.25, key)(x)
    assert set(np.unique(dropped)) == {0.0, np.float32(1 / 0.75)}
    np.testing.assert_allclose(dropped.mean(), 1, atol=0.02)


def test_a_magnitude_that_bfloat16_cannot_hold_still_counts():
    """1.003 is 1 in bfloat16; a factor rounded to that would forget what m learned."""
    x, kernel = draw(512, IN).astype(jnp.bfloat16), draw(IN, OUT, seed=1).astype(jnp.bfloat16)
    zero = {"a": jnp.zeros((IN, 1)), "b": jnp.zeros((1, OUT)), "scale": jnp.float32(1)}
    norm = jnp.linalg.norm(kernel.astype(jnp.float32), axis=0)
    same, more = (adapter.project(x, kernel, zero | {"m": norm * f}).astype(jnp.float32) for f in (1.0, 1.003))
    assert more.dtype == jnp.float32
    np.testing.assert_array_equal(same, (x @ kernel).astype(jnp.float32))
    np.testing.assert_allclose((more.astype(float) / same).mean(), 1.003, atol=5e-4)


def test_a_column_of_zeros_stays_one():
    """The rows of tokens that only pad a vocabulary are often zeros."""
    kernel, leaves = draw(IN, OUT, seed=1).at[:, 2].set(0), leaves_of("dora")
    leaves |= {"b": leaves["b"].at[:, 2].set(0), "m": leaves["m"].at[2].set(0)}
    y, pull = jax.value_and_grad(lambda low: adapter.project(draw(TOKENS, IN), kernel, low).sum())(leaves)
    assert np.isfinite(y)
    assert all(np.isfinite(g).all() for g in pull.values())
    assert not adapter.project(draw(TOKENS, IN), kernel, leaves)[:, 2].any()


@pytest.mark.parametrize("kind", KINDS)
def test_an_embedding_looks_up_rows_of_the_adapted_table(kind):
    table, leaves = draw(7, OUT), leaves_of(kind, n_in=7)
    tokens = jnp.array([[0, 6, 3], [3, 3, 1]])
    rows = adapter.lookup(table, tokens, leaves, jnp.float32)
    np.testing.assert_allclose(rows, weight(table, leaves)[np.asarray(tokens)], atol=1e-5)
    half = adapter.lookup(table, tokens, leaves, jnp.bfloat16)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), rows, atol=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_wide_features_meet_a_wide_table_as_features_meet_the_adapted_one(kind):
    """The output layer's adapter leads from features [D] to tokens [V], its table is [V, D]."""
    table, features, leaves = draw(7, IN), draw(2, 3, IN, seed=1), leaves_of(kind, n_out=7)
    wide, table_too = adapter.widen(features, leaves), adapter.wide(table, leaves)
    assert wide.shape[-1] == table_too.shape[-1] == IN + RANK * (2 if "pissa" in kind else 1)
    scores = jnp.einsum("btd,vd->btv", wide, table_too)
    np.testing.assert_allclose(scores, np.asarray(features) @ weight(table.T, leaves), atol=2e-5)
    assert adapter.wide(table.astype(jnp.bfloat16), leaves).dtype == jnp.bfloat16


def test_dropout_reaches_the_low_rank_part_of_the_output_layer_alone():
    features, leaves = draw(1, 2, IN), leaves_of("pissa", n_out=7)
    wide, dropped = adapter.widen(features, leaves), adapter.widen(features, leaves, jnp.zeros_like)
    np.testing.assert_array_equal(wide[..., :IN], dropped[..., :IN])
    assert not dropped[..., IN : IN + RANK].any()
    np.testing.assert_array_equal(wide[..., IN + RANK :], dropped[..., IN + RANK :])
