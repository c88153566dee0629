"""Trees of parameters: nested dicts whose leaves have an address.

A leaf's address is the path of its keys, `params/blocks/0-3/attn/q/kernel`. Everything that chooses among parameters
(what trains, what LoRA adapts, how it is sharded, what decays) is a regular expression over that path. There are no
masks and no sentinel leaves: `partition` gives two pruned trees, `combine` puts them together again.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

Tree = dict[str, Any]
Pattern = str | Sequence[str]


def flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Lists a tree's leaves by address.

    Args:
      tree: a nested dict; keys are strings without "/".

    Returns:
      {address: leaf}, in the order of the tree. Empty branches vanish.

    Example:
      >>> flat({"a": {"b": 1, "c": 2}, "d": 3})
      {'a/b': 1, 'a/c': 2, 'd': 3}
    """
    leaves = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            leaves |= {f"{key}/{rest}": leaf for rest, leaf in flat(value).items()}
        else:
            leaves[key] = value
    return leaves


def nest(leaves: Mapping[str, Any]) -> Tree:
    """Builds the tree of some addresses: the inverse of `flat`.

    Raises:
      ValueError: an address is a leaf and a branch at once.

    Example:
      >>> nest({"a/b": 1, "a/c": 2, "d": 3})
      {'a': {'b': 1, 'c': 2}, 'd': 3}
    """
    tree: Tree = {}
    for path, leaf in leaves.items():
        *branches, last = path.split("/")
        node = tree
        for key in branches:
            node = node.setdefault(key, {})
            if not isinstance(node, dict):
                raise ValueError(f"{path!r} passes through {key!r}, which is a leaf; rename one of the two")
        if last in node:
            raise ValueError(f"address {path!r} is given twice; give each leaf once")
        node[last] = leaf
    return tree


def matches(pattern: Pattern, path: str) -> bool:
    """Whether the whole of `path` matches the regular expression, or any of several.

    Example:
      >>> matches(".*/(q|v)/kernel", "blocks/0-3/attn/q/kernel")
      True
    """
    patterns = [pattern] if isinstance(pattern, str) else pattern
    return any(re.fullmatch(p, path) for p in patterns)


def partition(tree: Mapping[str, Any], pattern: Pattern) -> tuple[Tree, Tree]:
    """Splits a tree into the leaves whose address matches and the rest; both are pruned.

    Args:
      tree: a nested dict.
      pattern: a regular expression that must match a leaf's whole address, or several of them.

    Returns:
      (matching, rest), so that `combine(matching, rest)` has exactly the leaves of `tree`.

    Raises:
      ValueError: a pattern matches no leaf.

    Example:
      >>> partition({"params": {"w": 1}, "lora": {"a": 2, "b": 3}}, "lora/.*")
      ({'lora': {'a': 2, 'b': 3}}, {'params': {'w': 1}})
    """
    leaves = flat(tree)
    for one in [pattern] if isinstance(pattern, str) else pattern:
        if not any(matches(one, path) for path in leaves):
            some = ", ".join(list(leaves)[:8])
            raise ValueError(f"pattern {one!r} matches no leaf; the tree has {len(leaves)}, such as {some}")
    chosen = {path: leaf for path, leaf in leaves.items() if matches(pattern, path)}
    rest = {path: leaf for path, leaf in leaves.items() if path not in chosen}
    return nest(chosen), nest(rest)


def combine(*trees: Mapping[str, Any]) -> Tree:
    """Joins trees that share no leaf: the inverse of `partition`.

    Raises:
      ValueError: two trees give the same address.

    Example:
      >>> combine({"lora": {"a": 2}}, {"params": {"w": 1}, "lora": {"b": 3}})
      {'lora': {'a': 2, 'b': 3}, 'params': {'w': 1}}
    """
    leaves: dict[str, Any] = {}
    for tree in trees:
        for path, leaf in flat(tree).items():
            if path in leaves:
                raise ValueError(f"address {path!r} is given twice; partition the trees before combining them")
            leaves[path] = leaf
    return nest(leaves)


def count(tree: Mapping[str, Any]) -> int:
    """Counts the numbers in a tree of arrays (or of shapes).

    Example:
      >>> count({"w": jnp.zeros((2, 3)), "b": jnp.zeros(3)})
      9
    """
    return sum(leaf.size for leaf in flat(tree).values())


def cast(tree: Tree, dtype: jax.typing.DTypeLike) -> Tree:
    """Casts every floating-point leaf.

    Example:
      >>> cast({"w": jnp.zeros(2), "i": jnp.arange(2)}, jnp.bfloat16)["w"].dtype
      dtype(bfloat16)
    """
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)
