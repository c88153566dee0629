import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsft import lora, tree
from jaxsft.lora import LoRA

from .conftest import IN, LAYERS, OUT, TRAINS, VOCAB, base

Q, DOWN = "blocks/0-2/attn/q", "blocks/0-2/mlp/down"
EVERY = f"embed|head|{lora.ALL}"


def fresh(spec, seed=0, params=None):
    return tree.flat(lora.init(jax.random.key(seed), params or base(), spec))


def test_a_is_uniform_within_one_over_root_of_the_input_and_b_is_zero():
    adapter = fresh(LoRA(rank=16))
    a, b = adapter[f"{Q}/a"], adapter[f"{Q}/b"]
    bound = 1 / np.sqrt(IN)
    assert a.shape == (LAYERS, IN, 16)
    assert b.shape == (LAYERS, 16, OUT)
    assert 0.95 * bound < float(jnp.abs(a).max()) <= bound
    np.testing.assert_allclose(jnp.std(a), bound / np.sqrt(3), rtol=0.05)
    np.testing.assert_allclose(jnp.mean(a), 0, atol=0.05 * bound)
    assert not np.any(b)
    assert {x.dtype for x in adapter.values()} == {jnp.dtype("float32")}


@pytest.mark.parametrize("init", ["lora", "pissa", "olora"])
def test_an_embeddings_a_is_zero_and_its_b_normal_whatever_the_others_are(init):
    adapter = fresh(LoRA(rank=4, targets="embed|head", init=init))
    assert adapter["embed/a"].shape == (VOCAB, 4)
    assert not np.any(adapter["embed/a"])
    np.testing.assert_allclose(jnp.std(adapter["embed/b"]), 1, rtol=0.15)
    assert {p for p in adapter if p.startswith("embed")} == {"embed/a", "embed/b", "embed/scale"}
    assert adapter["head/a"].shape == (IN, 4)
    assert adapter["head/b"].shape == (4, VOCAB)


def test_layers_of_a_stack_and_kinds_of_layer_draw_apart_and_a_key_repeats_itself():
    first, again, other = (fresh(LoRA(rank=4), seed) for seed in (0, 0, 1))
    q, down = first[f"{Q}/a"], first[f"{DOWN}/a"]
    assert not np.any(np.asarray(q[0]) == np.asarray(q[1]))
    assert not np.any(np.asarray(q)[:, :OUT] == np.asarray(down))
    assert all(np.array_equal(first[p], again[p]) for p in first)
    assert not np.array_equal(q, other[f"{Q}/a"])


def test_patterns_give_layers_ranks_and_scales_of_their_own():
    spec = LoRA(rank=4, alpha=8.0, rank_pattern={".*/q": 2}, alpha_pattern={".*/down": 2.0})
    adapter = fresh(spec)
    assert adapter[f"{Q}/a"].shape == (LAYERS, IN, 2)
    assert adapter[f"{DOWN}/b"].shape == (LAYERS, 4, IN)
    np.testing.assert_array_equal(adapter[f"{Q}/scale"], np.full(LAYERS, 4.0, np.float32))
    np.testing.assert_array_equal(adapter[f"{DOWN}/scale"], np.full(LAYERS, 0.5, np.float32))


@pytest.mark.parametrize("init", ["lora", "pissa", "olora"])
@pytest.mark.parametrize("dora", [False, True])
def test_the_start_is_the_base(init, dora):
    params = base()
    spec = LoRA(rank=4, alpha=6.0, init=init, dora=dora, targets=EVERY)
    for layer, leaves in lora.layers(lora.init(jax.random.key(0), params, spec)).items():
        kernel = lora.matrix(params, layer)
        exact = init == "lora" and not dora
        np.testing.assert_allclose(lora.adapted(kernel, leaves), kernel, atol=0 if exact else 3e-6, err_msg=layer)


def test_pissa_starts_at_the_largest_singular_values():
    """Against numpy's decomposition in float64, of kernels whose singular values are apart."""
    draw = np.random.default_rng(3)
    kernels, best = [], []
    for _ in range(LAYERS):
        u, _ = np.linalg.qr(draw.normal(size=(12, 9)))
        v, _ = np.linalg.qr(draw.normal(size=(9, 9)))
        s = np.array([9.0, 7, 5, 3, 2, 1.5, 1, 0.5, 0.1])
        kernels.append(u * s @ v.T)
        best.append(u[:, :3] * s[:3] @ v[:, :3].T)
    params = {"blocks": {"0-2": {"q": {"kernel": jnp.asarray(np.stack(kernels), jnp.float32)}}}}
    for spec in (LoRA(rank=3, alpha=6.0, init="pissa"), LoRA(rank=3, alpha=2.0, init="pissa", rslora=True)):
        leaves = fresh(spec, params=params)
        a, b, scale = (np.asarray(leaves[f"blocks/0-2/q/{part}"]) for part in ("a", "b", "scale"))
        np.testing.assert_allclose(scale[:, None, None] * (a @ b), np.stack(best), atol=2e-5)
        sizes = np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=2)  # both carry the root of the singular value
        np.testing.assert_allclose(*sizes, rtol=1e-5)
        for half in "ab":
            np.testing.assert_array_equal(leaves[f"blocks/0-2/q/{half}"], leaves[f"blocks/0-2/q/{half}0"])


def test_the_constants_outlive_what_trains_when_a_step_takes_its_memory():
    make = lambda: lora.init(jax.random.key(0), base(), LoRA(rank=3, init="pissa", targets="head"))
    for leaves in (make()["head"], jax.jit(make)()["head"]):
        before = np.array(leaves["a"])
        jax.jit(lambda a: a + 1, donate_argnums=0)(leaves["a"])
        assert leaves["a"].is_deleted()
        np.testing.assert_array_equal(leaves["a0"], before)


def test_olora_starts_at_the_qr_of_the_transposed_kernel():
    params = base()
    leaves, kernel = fresh(LoRA(rank=5, init="olora")), np.asarray(params["blocks"]["0-2"]["attn"]["q"]["kernel"])
    for layer in range(LAYERS):
        q, r = np.linalg.qr(kernel[layer].T.astype(np.float64))
        a, b = (np.asarray(leaves[f"{Q}/{half}"][layer], np.float64) for half in "ab")
        np.testing.assert_allclose(b @ b.T, np.eye(5), atol=1e-5)
        np.testing.assert_allclose(b.T @ a.T, q[:, :5] @ r[:5], atol=1e-4)


def test_dora_starts_at_the_norms_of_the_columns():
    params = base()
    leaves = fresh(LoRA(rank=2, dora=True, targets=EVERY))
    kernel, table = np.asarray(params["blocks"]["0-2"]["attn"]["q"]["kernel"]), np.asarray(params["head"]["table"])
    np.testing.assert_allclose(leaves[f"{Q}/m"], np.sqrt((kernel**2).sum(1)), rtol=1e-6)
    np.testing.assert_allclose(leaves["head/m"], np.sqrt((table**2).sum(1)), rtol=1e-6)  # of each token's row
    embed = np.asarray(params["embed"]["table"])
    np.testing.assert_allclose(leaves["embed/m"], np.sqrt((embed**2).sum(0)), rtol=1e-6)  # of each feature


@pytest.mark.parametrize("init", ["lora", "pissa", "olora"])
def test_what_trains_is_a_b_and_m_and_the_constants_can_be_put_back(init):
    spec = LoRA(rank=2, alpha=3.0, dora=True, init=init, rank_pattern={".*/q": 3}, targets=EVERY)
    params, whole = base(), lora.init(jax.random.key(1), base(), spec)
    trains, rests = tree.partition({"params": params, "lora": whole}, lora.TRAINABLE)
    assert {p.rpartition("/")[2] for p in tree.flat(trains)} == set(TRAINS)
    assert {p.rpartition("/")[2] for p in tree.flat(rests["lora"])} <= {"scale", "a0", "b0"}
    back = tree.flat(lora.complete(trains["lora"], params, spec))
    assert back.keys() == tree.flat(whole).keys()
    for path, leaf in tree.flat(whole).items():
        np.testing.assert_array_equal(back[path], leaf, err_msg=path)


@pytest.mark.parametrize("spec", [LoRA(rank=0), LoRA(rank=-3), LoRA(rank_pattern={".*/q": 0})])
def test_a_rank_below_one_is_refused(spec):
    with pytest.raises(ValueError, match=r"tuning.lora.rank is (0|-3); it must be at least 1"):
        fresh(spec)


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match=r"tuning.lora.rank 41 is more than .*attn/q of 64 x 40 has; pissa needs less"):
        fresh(LoRA(rank=41, init="pissa"))
    with pytest.raises(ValueError, match="tuning.lora.init 'eva' is not known; known are lora, pissa, olora"):
        fresh(LoRA(init="eva"))  # type: ignore[arg-type]


@pytest.mark.parametrize("spec", [LoRA(rank=2, dora=True), LoRA(rank=2, init="pissa")])
def test_shapes_alone_do_not_start_what_starts_from_the_weights(spec):
    shapes = jax.eval_shape(base)
    plain = lora.init(jax.random.key(0), shapes, LoRA(rank=2, targets=EVERY))
    assert plain["head"]["a"].shape == (IN, 2)
    with pytest.raises(ValueError, match=r"start from the weights of blocks/0-2/attn/q; give the parameters"):
        lora.init(jax.random.key(0), shapes, spec)
