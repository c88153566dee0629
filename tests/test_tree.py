import jax.numpy as jnp
import numpy as np
import pytest

from jaxsft import tree

TREE = {"params": {"q": {"kernel": 1, "bias": 2}, "norm": {"scale": 3}}, "lora": {"q": {"a": 4}}}
PATHS = ["params/q/kernel", "params/q/bias", "params/norm/scale", "lora/q/a"]


def walk(node, prefix=""):
    """(address, leaf) pairs by recursion over lists, not over the code under test."""
    if not isinstance(node, dict):
        return [(prefix, node)]
    return [pair for key, value in node.items() for pair in walk(value, f"{prefix}/{key}" if prefix else key)]


def test_flat_lists_every_leaf_by_its_address_in_order():
    assert list(tree.flat(TREE).items()) == walk(TREE) == list(zip(PATHS, [1, 2, 3, 4], strict=True))


def test_nest_is_the_inverse_of_flat():
    assert tree.nest(tree.flat(TREE)) == TREE
    assert tree.flat(tree.nest({"a": 1, "b/c/d": 2})) == {"a": 1, "b/c/d": 2}


def test_empty_branches_vanish():
    assert tree.nest(tree.flat({"a": {}, "b": {"c": {}, "d": 1}})) == {"b": {"d": 1}}


def test_an_address_cannot_be_leaf_and_branch():
    with pytest.raises(ValueError, match="'a/b' passes through 'a', which is a leaf"):
        tree.nest({"a": 1, "a/b": 2})
    with pytest.raises(ValueError, match="address 'a' is given twice"):
        tree.nest({"a/b": 2, "a": 1})


def test_a_pattern_must_match_the_whole_address():
    assert tree.matches("params/.*", "params/q/kernel")
    assert not tree.matches("q/kernel", "params/q/kernel")
    assert not tree.matches("params", "params/q")
    assert tree.matches(["x", ".*/bias"], "params/q/bias")
    assert not tree.matches([], "params/q/bias")


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (".*/kernel", {"params/q/kernel"}),
        ("params/.*", {"params/q/kernel", "params/q/bias", "params/norm/scale"}),
        ([".*/a", ".*/scale"], {"lora/q/a", "params/norm/scale"}),
        (".*", set(PATHS)),
    ],
)
def test_partition_splits_all_leaves_and_combine_joins_them(pattern, expected):
    chosen, rest = tree.partition(TREE, pattern)
    assert set(tree.flat(chosen)) == expected
    assert set(tree.flat(rest)) == set(PATHS) - expected
    assert tree.combine(chosen, rest) == tree.combine(rest, chosen) == TREE


def test_a_pattern_that_matches_nothing_raises_even_among_others():
    with pytest.raises(ValueError, match=r"pattern 'params/k/.\*' matches no leaf; the tree has 4, such as params/q/k"):
        tree.partition(TREE, ["params/q/.*", "params/k/.*"])


def test_no_pattern_at_all_chooses_nothing():
    assert tree.partition(TREE, []) == ({}, TREE)


def test_combine_refuses_an_address_given_twice():
    with pytest.raises(ValueError, match="'lora/q/a' is given twice; partition"):
        tree.combine(TREE, {"lora": {"q": {"a": 5}}})


def test_count_and_cast():
    arrays = {"w": jnp.ones((2, 3)), "i": jnp.arange(4), "deep": {"h": jnp.ones((), jnp.float16)}}
    assert tree.count(arrays) == 2 * 3 + 4 + 1
    half = tree.cast(arrays, jnp.bfloat16)
    assert [str(x.dtype) for x in tree.flat(half).values()] == ["bfloat16", "int32", "bfloat16"]
    np.testing.assert_array_equal(half["i"], arrays["i"])
    assert arrays["w"].dtype == jnp.float32
