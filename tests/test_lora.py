import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxsft import lora, models, sharding, tree
from jaxsft.lora import LoRA

LAYERS, IN, OUT = 3, 64, 40


def base(dtype=np.float32):
    """Parameters of a stack with two adapted kinds of layer, and other leaves."""
    draw = np.random.default_rng(0)
    shapes = {
        "embed/table": (7, IN),
        "blocks/0-2/attn/q/kernel": (LAYERS, IN, OUT),
        "blocks/0-2/attn/q/bias": (LAYERS, OUT),
        "blocks/0-2/mlp/down/kernel": (LAYERS, OUT, IN),
        "norm/scale": (IN,),
    }
    return tree.nest({p: jnp.asarray(draw.normal(size=s).astype(dtype)) for p, s in shapes.items()})


def filled(spec, seed=1):
    """An adapter whose B is not zero."""
    draw, adapter = np.random.default_rng(seed), tree.flat(lora.init(jax.random.key(seed), base(), spec))
    change = {p: jnp.asarray(draw.normal(size=x.shape), jnp.float32) for p, x in adapter.items() if p.endswith("/b")}
    return tree.nest(adapter | change)


def test_a_is_uniform_within_one_over_root_of_the_input_and_b_is_zero():
    adapter = tree.flat(lora.init(jax.random.key(0), base(), LoRA(rank=16)))
    a, b = adapter["blocks/0-2/attn/q/a"], adapter["blocks/0-2/attn/q/b"]
    bound = 1 / np.sqrt(IN)
    assert a.shape == (LAYERS, IN, 16)
    assert b.shape == (LAYERS, 16, OUT)
    assert 0.95 * bound < float(jnp.abs(a).max()) <= bound
    np.testing.assert_allclose(jnp.std(a), bound / np.sqrt(3), rtol=0.05)
    np.testing.assert_allclose(jnp.mean(a), 0, atol=0.05 * bound)
    assert not np.any(b)
    assert {x.dtype for x in adapter.values()} == {jnp.dtype("float32")}


def test_layers_of_a_stack_and_kinds_of_layer_draw_apart_and_a_key_repeats_itself():
    draw = lambda seed: tree.flat(lora.init(jax.random.key(seed), base(), LoRA(rank=4)))
    first, again, other = draw(0), draw(0), draw(1)
    q, down = first["blocks/0-2/attn/q/a"], first["blocks/0-2/mlp/down/a"]
    assert not np.any(np.asarray(q[0]) == np.asarray(q[1]))
    assert not np.any(np.asarray(q)[:, :OUT] == np.asarray(down))
    assert all(np.array_equal(first[p], again[p]) for p in first)
    assert not np.array_equal(q, other["blocks/0-2/attn/q/a"])


@pytest.mark.parametrize(("spec", "expected"), [
    (LoRA(rank=8, alpha=32.0), 4.0),
    (LoRA(rank=64, alpha=32.0), 0.5),
    (LoRA(rank=64, alpha=32.0, rslora=True), 4.0),
])  # fmt: skip
def test_the_scale_is_alpha_over_rank_or_over_its_root(spec, expected):
    assert lora.scale(spec) == expected
    scales = [x for p, x in tree.flat(lora.init(jax.random.key(0), base(), spec)).items() if p.endswith("/scale")]
    assert len(scales) == 2
    for each in scales:
        np.testing.assert_array_equal(each, np.full(LAYERS, expected, np.float32))


def test_what_trains_is_a_and_b_and_the_scale_can_be_put_back():
    spec = LoRA(rank=2, alpha=3.0)
    whole = filled(spec)
    trains, rests = tree.partition({"params": base(), "lora": whole}, lora.TRAINABLE)
    assert {p.rsplit("/", 1)[1] for p in tree.flat(trains)} == {"a", "b"}
    assert {p.rsplit("/", 1)[1] for p in tree.flat(rests["lora"])} == {"scale"}
    back = lora.with_scale(trains["lora"], spec)
    assert all(np.array_equal(x, tree.flat(whole)[p]) for p, x in tree.flat(back).items())
    assert set(tree.flat(back)) == set(tree.flat(whole))


@pytest.mark.parametrize(("targets", "chosen"), [
    ("all", {"blocks/0-2/attn/q", "blocks/0-2/mlp/down"}),
    (".*/q", {"blocks/0-2/attn/q"}),
    ("blocks/[^/]+/mlp/.*", {"blocks/0-2/mlp/down"}),
])  # fmt: skip
def test_targets_choose_layers_by_address(targets, chosen):
    adapter = lora.init(jax.random.key(0), base(), LoRA(rank=2, targets=targets))
    assert {p.rsplit("/", 1)[0] for p in tree.flat(adapter)} == chosen


def test_targets_that_match_nothing_are_refused_with_what_there_is():
    with pytest.raises(ValueError, match=r"targets 'q_proj' matches no layer; there are blocks/0-2/attn/q, blocks/"):
        lora.init(jax.random.key(0), base(), LoRA(targets="q_proj"))


@pytest.mark.parametrize("rank", [0, -3])
def test_a_rank_below_one_is_refused(rank):
    with pytest.raises(ValueError, match=f"tuning.lora.rank is {rank}; it must be at least 1"):
        lora.init(jax.random.key(0), base(), LoRA(rank=rank))


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_merging_adds_in_float32_and_casts_once(dtype):
    params, adapter = base(dtype), filled(LoRA(rank=4, alpha=6.0))
    merged, low = tree.flat(lora.merge({"params": params, "lora": adapter})), tree.flat(adapter)
    for path, kernel in tree.flat(params).items():
        expected = np.asarray(kernel)
        if path.endswith("kernel"):
            a, b = (np.asarray(low[path.replace("kernel", part)]) for part in "ab")
            change = np.stack([np.float32(1.5) * (a[i] @ b[i]) for i in range(LAYERS)])
            full = expected.astype(np.float32) + change
            twice = (expected + change.astype(dtype)).astype(dtype)
            expected = full.astype(dtype)
            if dtype != np.float32:
                assert np.any(expected != twice)  # so that the claim is seen to hold
        assert merged[path].dtype == dtype
        if dtype == np.float32:
            np.testing.assert_allclose(merged[path], expected, rtol=1e-5, atol=1e-5)
        else:  # the sums over the rank may differ in their last bit, and so may a few roundings
            assert np.mean(np.asarray(merged[path]) != expected) < 0.01


def test_merging_a_fresh_adapter_or_none_changes_no_bit():
    params = base(ml_dtypes.bfloat16)
    for adapter in ({"lora": lora.init(jax.random.key(0), params, LoRA(rank=4))}, {}):
        merged = tree.flat(lora.merge({"params": params, **adapter}))
        assert all(np.array_equal(x, merged[p]) for p, x in tree.flat(params).items())


def test_merging_refuses_an_adapter_at_an_address_without_a_kernel():
    adapter = {"blocks": {"0-1": filled(LoRA(rank=2))["blocks"]["0-2"]}}
    with pytest.raises(ValueError, match=r"adapter at blocks/0-1/attn/q has no kernel to merge into; was it made for"):
        lora.merge({"params": base(), "lora": adapter})


def test_sharding_rules_of_an_adapter_follow_those_of_the_kernels():
    found = lora.rules((("x/(q|k)/kernel", P(None, "fsdp", "tensor")), ("x/q/bias", P(None, "tensor"))))
    assert found == (
        ("x/(q|k)/a", P(None, "fsdp", None)),
        ("x/(q|k)/b", P(None, None, "tensor")),
        ("x/(q|k)/scale", P(None)),
    )


@pytest.mark.parametrize("family", models.FAMILIES)
def test_the_rules_of_every_family_cover_every_adapter(family):
    mesh = sharding.mesh(2, 2, 2)
    placed = sharding.shardings(filled(LoRA(rank=2)), lora.rules(models.FAMILIES[family].rules), mesh)
    assert placed["blocks"]["0-2"]["attn"]["q"]["a"].spec == P(None, "fsdp", None)
    assert placed["blocks"]["0-2"]["mlp"]["down"]["b"].spec == P(None, None, "fsdp")
