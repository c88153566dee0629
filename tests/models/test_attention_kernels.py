import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsft import sharding
from jaxsft.models import DecoderConfig, EncoderConfig, ResNetConfig, build
from jaxsft.models.attention import BOTH_SIDES, NO_WINDOW, SINKS, WINDOWS, attend, choose, describe
from jaxsft.models.attention.choice import BEST, KERNELS
from jaxsft.models.attention.mha import mha
from jaxsft.models.attention.splash import splash
from tests.models.test_attention import assert_same, at_once, pairs, pulled, where

# 300 tokens are no multiple of a kernel's block; the second row ends in padding.
ROWS = where([100, 200], [130, 120, 30, -20])
CAPPED = {"window": 70, "sinks": True, "soft_cap": 1.5, "scale": 0.4}


@pytest.mark.parametrize("how", [{}, CAPPED], ids=["documents", "window, sinks, cap"])
def test_splash_interpreted_has_the_values_and_gradients_of_all_scores_at_once(how):
    assert_same(pulled(splash, ROWS, **how), pulled(at_once, ROWS, **how))


def test_mha_interpreted_has_the_values_and_gradients_of_all_scores_at_once():
    def without_sinks(*given, sinks, **how):
        assert sinks is None
        return mha(*given, **how)

    assert_same(pulled(without_sinks, ROWS, scale=0.4), pulled(at_once, ROWS, scale=0.4))


def test_a_fixed_kernel_on_a_mesh_goes_by_the_window_that_a_scanned_layer_has():
    mesh = sharding.mesh(data=2, tensor=2, devices=jax.devices()[:4])
    fixed = functools.partial(attend, kernel="splash", windows=(70, NO_WINDOW), mesh=mesh)
    how = CAPPED | {"window": jnp.int32(70)}
    assert_same(pulled(fixed, ROWS, **how), pulled(at_once, ROWS, **CAPPED))


RINGS = {
    "2 devices, documents": (2, 1, ROWS, {"window": 170}),
    "4 devices and heads, pairs": (4, 2, pairs([(100, 60, 98), (10, 10, 20)], [(20, 30, 40), (130, 69, 9)]), CAPPED),
}


@pytest.mark.parametrize(("context", "tensor", "rows", "how"), RINGS.values(), ids=RINGS)
def test_a_ring_has_the_values_and_gradients_of_all_scores_at_once(context, tensor, rows, how):
    assert rows.positions.shape[1] % context == 0
    mesh = sharding.mesh(data=1, context=context, tensor=tensor, devices=jax.devices()[: context * tensor])
    ring = functools.partial(attend, mesh=mesh)
    assert_same(pulled(ring, rows, **how), pulled(at_once, rows, **how))


def test_no_device_of_a_ring_holds_the_keys_of_a_whole_row():
    mesh = sharding.mesh(data=1, context=4, devices=jax.devices()[:4])
    x = jax.ShapeDtypeStruct((1, 4096, 2, 8), jnp.float32)
    place = where([4096])
    run = jax.jit(lambda q, k, v: attend(q, k, v, place, mesh=mesh))
    assert "collective-permute" in (program := run.lower(x, x, x).compile().as_text())
    assert "all-gather" not in program


@pytest.mark.parity  # a long one
def test_a_decoder_whose_rows_are_cut_is_the_one_that_has_them_whole():
    config = DecoderConfig(32, 16, 16, 2, heads=4, kv_heads=2, head_dim=4, max_position=64, windows=(None, 8))
    mesh = sharding.mesh(data=2, context=2, tensor=2)
    whole, cut = build(config), build(config, mesh=mesh)
    params = whole.init(jax.random.key(0))
    rows, tokens = where([20, 12], [7, 20, -5]), jax.random.randint(jax.random.key(1), (2, 32), 0, 32)
    real = (rows.segments > 0)[..., None]

    def pull(model):
        loss = lambda p: jnp.where(real, jnp.sin(model.features({"params": p}, tokens, *rows[:2])), 0).sum()
        return jax.jit(jax.value_and_grad(loss))(params)

    assert cut.attention.endswith("keys in a ring of 2")
    for ours, other in zip(jax.tree.leaves(pull(cut)), jax.tree.leaves(pull(whole)), strict=True):
        np.testing.assert_allclose(ours, other, atol=2e-5)


def test_every_best_kernel_runs_there_and_every_backend_has_one_that_can_do_all():
    for backend, names in BEST.items():
        assert all(backend in KERNELS[name].backends for name in names)
        assert not KERNELS[names[-1]].lacks


def test_what_is_chosen_can_do_what_the_model_needs():
    assert choose("auto", (), backend="gpu") == "mha"
    assert choose("auto", {WINDOWS}, backend="gpu") == choose("auto", {BOTH_SIDES}, backend="tpu") == "blocks"
    assert choose("auto", {WINDOWS, SINKS}, backend="tpu") == "splash"
    cut = sharding.mesh(data=4, context=2)
    assert choose("auto", (), cut, backend="tpu") == "blocks"
    assert describe("blocks", cut) == "blocks (cpu), keys in a ring of 2"


def test_an_impossible_choice_says_what_is_possible():
    shape = DecoderConfig(32, 8, 16, 2, heads=2, kv_heads=1, head_dim=4, max_position=64)
    with pytest.raises(ValueError, match="'flash' is not known; known are auto, blocks"):
        build(shape, attention="flash")
    with pytest.raises(ValueError, match="splash runs on a tpu, and this is a cpu; take auto, or one of blocks, plain"):
        build(shape, attention="splash")
    with pytest.raises(ValueError, match="plain has no rows cut over mesh.context"):
        build(shape, attention="plain", mesh=sharding.mesh(data=4, context=2))
    with pytest.raises(ValueError, match="splash runs on a tpu"):
        build(EncoderConfig(32, 8, 16, 2, heads=2, max_position=64), attention="splash")
    with pytest.raises(ValueError, match="a network of convolutions has none"):
        build(ResNetConfig(8, widths=(8,), depths=(1,)), attention="plain")
