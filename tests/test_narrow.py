"""bfloat16 on a CPU: the plain operations' values and gradients, and no array of float32 that they do not need."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsft import narrow
from jaxsft.models import remat

L, N, D = 6, 40, 24


def draw(seed, *shape, dtype=jnp.bfloat16):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def near(found, exact):
    """Equal but for one rounding to bfloat16, whose last bit may fall otherwise where the sum was float32."""
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(found, np.float64), exact, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("rows", [(N,), (5, 8)])
def test_a_product_and_its_gradients_are_rounded_once(rows):
    x, kernel, dy = draw(0, *rows, D), draw(1, D, 16), draw(2, *rows, 16)
    y, pull = jax.vjp(narrow.product, x, kernel)
    dx, dkernel = pull(dy)
    full = [np.asarray(part, np.float64) for part in (x, kernel, dy)]
    near(y, full[0] @ full[1])
    near(dx, full[2] @ full[1].T)
    near(dkernel, full[0].reshape(-1, D).T @ full[2].reshape(-1, 16))


def test_float32_is_the_plain_product():
    x, kernel = draw(0, N, D, dtype=jnp.float32), draw(1, D, 16, dtype=jnp.float32)
    np.testing.assert_array_equal(narrow.product(x, kernel), x @ kernel)
    assert jax.make_jaxpr(narrow.product)(x, kernel).eqns[-1].primitive.name == "dot_general"


def test_moved_is_the_identity_and_so_is_its_gradient():
    odd = jnp.array([jnp.nan, jnp.inf, -jnp.inf, -0.0, 1e-40, 3.0], jnp.bfloat16)
    found = narrow.moved(lambda x: x, odd)
    np.testing.assert_array_equal(found.view(jnp.uint16), odd.view(jnp.uint16))
    rows, at, dy = draw(0, 5, 3), jnp.array([4, 0, 4]), draw(1, 3, 3)
    _, pull = jax.vjp(lambda rows: narrow.moved(lambda rows, at: rows[at], rows, at), rows)
    expected = np.zeros((5, 3))
    np.add.at(expected, np.asarray(at), np.asarray(dy, np.float64))
    near(pull(dy)[0], expected)
    put = lambda old, new: narrow.moved(lambda old, new: old.at[1:3].set(new), old, new)
    found, pull = jax.vjp(put, rows, dy[:2])
    np.testing.assert_array_equal(found, rows.at[1:3].set(dy[:2]))
    of_old, of_new = pull(jnp.ones_like(rows))
    np.testing.assert_array_equal(np.asarray(of_old, np.float32)[:, 0], [1, 0, 0, 1, 1])
    np.testing.assert_array_equal(of_new, jnp.ones((2, 3), jnp.bfloat16))


def layer(x, row):
    kernel, shift = row
    return x + jnp.tanh(remat.dear(narrow.product(x, kernel))) + shift.astype(x.dtype), None


@pytest.mark.parametrize("policy", ["none", "dots", "block"])
def test_a_scan_over_layers_is_the_loop(policy):
    x, kernels, shifts = draw(0, N, D), 0.2 * draw(1, L, D, D), draw(2, L, D, dtype=jnp.float32)
    again = remat.rematerialise(policy)

    def scanned(x, kernels, shifts):
        return narrow.scan(layer, x, (kernels, shifts), again)[0]

    def loop(x, kernels, shifts):
        for row in zip(kernels, shifts, strict=True):
            x = layer(x, row)[0]
        return x

    weights = draw(3, N, D)
    found, pull = jax.vjp(jax.jit(scanned), x, kernels, shifts)
    expected, pull_loop = jax.vjp(jax.jit(loop), x, kernels, shifts)
    np.testing.assert_allclose(found.astype(jnp.float32), expected.astype(jnp.float32), rtol=0.02, atol=0.02)
    for ours, theirs in zip(pull(weights), pull_loop(weights), strict=True):
        assert ours.dtype == theirs.dtype
        size = float(jnp.abs(theirs).max())
        np.testing.assert_allclose(ours.astype(jnp.float32), theirs.astype(jnp.float32), atol=0.02 * size)


def test_what_layers_give_is_stacked_as_it_is():
    x, kernels = draw(0, N, D), draw(1, L, D, D)
    give = lambda x, row: (x, (row[0], row[0] > 0))
    found = narrow.scan(give, x, kernels[:, :1])[1]
    np.testing.assert_array_equal(found[0], kernels[:, 0])
    np.testing.assert_array_equal(found[1], kernels[:, 0] > 0)


def test_nothing_is_widened_to_be_moved_or_multiplied():
    """The compiled forward and backward pass: bfloat16 products, no float32 copy of stacked weights or results."""
    x, kernels = draw(0, 4 * N, 2 * D), draw(1, L, 2 * D, 8 * D)
    wide = lambda x, kernel: (
        x + narrow.product(jnp.tanh(remat.dear(narrow.product(jnp.sin(x), kernel))), kernel.T),
        None,
    )
    run = lambda x: narrow.scan(wide, x, kernels, remat.rematerialise("dots"))[0].astype(jnp.float32).sum()
    text = jax.jit(jax.grad(run)).lower(x).compile().as_text()
    stacked = {match for match in re.findall(r"f32\[(\d+(?:,\d+)+)\]", text) if match.startswith(f"{L},")}
    assert stacked == {f"{L},{4 * N},{2 * D}"}  # what goes from layer to layer, alone
    plain = lambda x: jax.lax.scan(remat.rematerialise("dots")(wide), x, kernels)[0].astype(jnp.float32).sum()
    old = jax.jit(jax.grad(plain)).lower(x).compile().as_text()
    assert f"f32[{L},{2 * D},{8 * D}]" in old  # if this fails, XLA does it by itself: narrow.scan may go


def test_devices_that_stand_for_others_compute_plainly():
    x, kernels = draw(0, N, D), draw(1, L, D, D)
    run = lambda x: narrow.scan(lambda x, w: (remat.dear(narrow.product(x, w)), None), x, kernels)[0]
    assert "bitcast" in str(jax.make_jaxpr(run)(x))
    with narrow.stands_in():
        program = str(jax.make_jaxpr(lambda x: run(x))(x))
    assert "bitcast" not in program
    assert "f32" not in program.replace("preferred_element_type=float32", "")
