import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxsft import lora, tree
from jaxsft.lora import Adapter, LoRA

from .conftest import LAYERS, base, filled

EVERY = f"embed|head|{lora.ALL}"
KINDS = {
    "lora": LoRA(rank=4, alpha=6.0),
    "pissa": LoRA(rank=4, alpha=6.0, init="pissa"),
    "dora": LoRA(rank=4, alpha=6.0, dora=True),
    "pissa-dora": LoRA(rank=4, alpha=6.0, init="pissa", dora=True),
    "tables": LoRA(rank=4, alpha=6.0, init="pissa", dora=True, targets=EVERY),
}


def plain(kernel, leaves):
    """One layer's weight by the papers' formulas, in float64."""
    leaf = {name: np.asarray(x, np.float64) for name, x in leaves.items()}
    full = np.asarray(kernel, np.float64) + leaf["scale"] * leaf["a"] @ leaf["b"]
    if "a0" in leaf:
        full = full - leaf["scale"] * leaf["a0"] @ leaf["b0"]
    if "m" in leaf:
        for column in range(full.shape[1]):
            full[:, column] *= leaf["m"][column] / np.sqrt(sum(full[:, column] ** 2))
    return full


@pytest.mark.parametrize("kind", KINDS)
def test_merging_folds_every_kind_in(kind):
    params, adapter = base(), filled(KINDS[kind])
    merged = lora.merge({"params": params, "lora": adapter})
    for layer, leaves in lora.layers(adapter).items():
        before, after = lora.matrix(params, layer), lora.matrix(merged, layer)
        if before.ndim == 2:
            np.testing.assert_allclose(after, plain(before, leaves), atol=2e-5, err_msg=layer)
        for row in range(LAYERS) if before.ndim == 3 else ():
            one = {name: x[row] for name, x in leaves.items()}
            np.testing.assert_allclose(after[row], plain(before[row], one), atol=2e-5, err_msg=layer)
            there = lora.adapted(jnp.asarray(before[row]), {name: jnp.asarray(x) for name, x in one.items()})
            np.testing.assert_allclose(there, after[row], atol=2e-5)  # jax arrays do as well
    changed = {f"{layer}/{kind}" for layer in lora.layers(adapter) for kind in ("kernel", "table")}
    for path, leaf in tree.flat(params).items():
        assert np.array_equal(leaf, tree.flat(merged)[path]) == (path not in changed)


def test_merging_an_adapted_embedding_makes_no_output_layer_for_a_reward_model():
    params = {**base(tied=True), "score": {"kernel": np.ones((64, 1), np.float32)}}
    adapter = filled(LoRA(rank=2, targets="embed"), params=params)
    merged = lora.merge({"params": params, "lora": adapter})
    assert tree.flat(merged).keys() == tree.flat(params).keys()
    assert np.abs(merged["embed"]["table"] - params["embed"]["table"]).max() > 0.1


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


@pytest.mark.parametrize("targets", ["embed", "head"])
def test_merging_parts_a_tied_output_layer_from_its_embedding_where_one_is_adapted(targets):
    params = base(tied=True)
    adapter = filled(LoRA(rank=2, targets=targets), params=params)
    merged, old = lora.merge({"params": params, "lora": adapter}), params["embed"]["table"]
    change = lora.adapted(np.zeros_like(lora.matrix(params, targets)), lora.layers(adapter)[targets])
    expected = {"embed": old, "head": old}
    expected[targets] = old + (change if targets == "embed" else change.T)
    for layer, table in expected.items():
        np.testing.assert_allclose(merged[layer]["table"], table, atol=1e-6)
    assert "head" not in lora.merge({"params": params, "lora": filled(LoRA(rank=2), params=params)})


def test_a_weighted_sum_of_adapters_is_exact_and_adds_up_ranks():
    params = base()
    parts = [
        (filled(LoRA(rank=4, alpha=6.0, targets="embed|.*/q"), seed=1), 0.7),
        (filled(LoRA(rank=3, alpha=2.0, init="pissa"), seed=2), -0.4),
        (filled(LoRA(rank=2, alpha=9.0, targets="head|.*/down"), seed=3), 2.0),
    ]
    summed = lora.weighted(parts)
    assert {layer: x["a"].shape[-1] for layer, x in lora.layers(summed).items()} == {
        "embed": 4,
        "blocks/0-2/attn/q": 4 + 6,
        "blocks/0-2/mlp/down": 6 + 2,
        "head": 2,
    }
    for layer in lora.layers(summed):
        kernel = lora.matrix(params, layer)
        change = lambda adapter, layer=layer, kernel=kernel: (
            lora.adapted(np.zeros_like(kernel), lora.layers(adapter)[layer]) if layer in lora.layers(adapter) else 0
        )
        expected = sum(np.asarray(weight * change(adapter), np.float64) for adapter, weight in parts)
        np.testing.assert_allclose(change(summed), expected, atol=1e-5, err_msg=layer)


def test_what_does_not_add_up_is_refused():
    with pytest.raises(ValueError, match=r"adapter of blocks/0-2/attn/q is a DoRA, whose change is no sum"):
        lora.weighted([(filled(LoRA(rank=2)), 1.0), (filled(LoRA(rank=2, dora=True)), 1.0)])
    with pytest.raises(ValueError, match="no adapter to add up"):
        lora.weighted([])


def test_an_adapter_is_put_on_a_base_that_stays_as_it_is():
    params = base()
    before = tree.flat(params)
    one = Adapter(filled(LoRA(rank=2)), LoRA(rank=2), {"norm": {"scale": np.ones(3)}})
    variables = lora.attach(params, one)
    assert variables["params"]["norm"]["scale"] is one.params["norm"]["scale"]
    assert variables["params"]["embed"]["table"] is params["embed"]["table"]
    assert all(tree.flat(params)[path] is leaf for path, leaf in before.items())
    again = lora.attach(params, Adapter(filled(LoRA(rank=3)), LoRA(rank=3), {}))
    assert again["params"]["norm"]["scale"] is params["norm"]["scale"]
