"""What an adapter amounts to: a change of the weights, added up, folded in, or put on a base.

Works on numpy and jax arrays alike; sums are float32.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxsft import tree
from jaxsft.lora.spec import LoRA, matrix
from jaxsft.tree import Tree


class Adapter(NamedTuple):
    """What a run or a folder adds to a base."""

    lora: Tree  # for variables["lora"]
    spec: LoRA
    params: Tree  # weights in the place of the base's, PEFT's modules_to_save; whole leaves, most often none


def attach(params: Mapping, adapter: Adapter) -> Tree:
    """The variables of a base with an adapter on it; the base stays as it is, and so can carry another one next.

    Example:
      >>> base = {"norm": {"scale": 1}, "q": {"kernel": 2}}
      >>> attach(base, Adapter({"q": {"a": 3}}, LoRA(), {"norm": {"scale": 4}}))
      {'params': {'norm': {'scale': 4}, 'q': {'kernel': 2}}, 'lora': {'q': {'a': 3}}}
    """
    return {"params": tree.nest(tree.flat(params) | tree.flat(adapter.params)), "lora": adapter.lora}


def layers(adapter: Mapping) -> dict[str, dict[str, Any]]:
    """The leaves of each adapted layer.

    Example:
      >>> layers({"mlp": {"up": {"a": 1, "b": 2}}})
      {'mlp/up': {'a': 1, 'b': 2}}
    """
    found: dict[str, dict[str, Any]] = {}
    for path, leaf in tree.flat(adapter).items():
        layer, _, name = path.rpartition("/")
        found.setdefault(layer, {})[name] = leaf
    return found


def folded(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves of a layer without A0 and B0: the same change as a LoRA of twice the rank, [A, A0] and [B; -B0].

    Source: Meng et al. 2024, arXiv:2404.02948, on converting PiSSA to LoRA.
    """
    if "a0" not in leaves:
        return dict(leaves)
    a = _joined([leaves["a"], leaves["a0"]], axis=-1)
    b = _joined([leaves["b"], -leaves["b0"]], axis=-2)
    return {name: leaf for name, leaf in leaves.items() if name not in ("a0", "b0")} | {"a": a, "b": b}


def adapted(kernel: Any, leaves: Mapping[str, Any]) -> Any:
    """W + scale A B of a layer or of a stack, float32; with m each column of that norm (DoRA, eq. 5).

    Args:
      kernel: W, [.., in, out].
      leaves: the adapter of the layer.

    Example:
      >>> leaves = {"a": np.ones((2, 1), "float32"), "b": np.ones((1, 1), "float32"), "scale": np.float32(2)}
      >>> adapted(np.array([[1.0], [2.0]], "float32"), leaves | {"m": np.float32([10])}).ravel().tolist()
      [6.0, 8.0]
    """
    leaves = folded(leaves)
    change = leaves["scale"][..., None, None] * (leaves["a"].astype("float32") @ leaves["b"].astype("float32"))
    full = kernel.astype("float32") + change
    if "m" not in leaves:
        return full
    norm = ((full * full).sum(-2) ** 0.5).clip(np.finfo(np.float32).tiny ** 0.5)
    return full * (leaves["m"] / norm)[..., None, :]


def merge(variables: Mapping) -> Tree:
    """Folds the adapter into the weights, added in float32 and cast once.

    Args:
      variables: {"params": ..., "lora": ...}.

    Returns:
      params whose model answers as base and adapter together did. Where the output layer was tied to the embedding and
      one of them is adapted, it gets a table of its own.

    Raises:
      ValueError: an adapter at an address where there is no kernel.

    Example:
      >>> lora = {"q": {"a": jnp.ones((4, 2)), "b": jnp.ones((2, 3)), "scale": jnp.float32(0.5)}}
      >>> merge({"params": {"q": {"kernel": jnp.ones((4, 3))}}, "lora": lora})["q"]["kernel"][0]
      Array([2., 2., 2.], dtype=float32)
    """
    params, found = tree.flat(variables["params"]), layers(variables.get("lora", {}))
    if {"embed", "head"} & set(found) and not {"head/table", "head/kernel", "score/kernel"} & set(params):
        params["head/table"] = params["embed/table"]
    merged = dict(params)
    for layer, leaves in found.items():
        kernel = matrix(variables["params"], layer)
        result = adapted(kernel, leaves).astype(kernel.dtype)
        weight = f"{layer}/kernel" if f"{layer}/kernel" in params else f"{layer}/table"
        merged[weight] = result.T if weight == "head/table" else result
    return tree.nest(merged)


def weighted(adapters: Sequence[tuple[Mapping, float]]) -> Tree:
    """One adapter whose change is the weighted sum of several; ranks add up, and the sum is exact.

    Args:
      adapters: LoRA trees and their weights; a layer may be in some of them only.

    Raises:
      ValueError: none at all, or DoRA, whose change is not a sum.

    Example:
      >>> one = {"q": {"a": jnp.ones((4, 2)), "b": jnp.ones((2, 3)), "scale": jnp.float32(0.5)}}
      >>> both = weighted([(one, 1.0), (one, -0.25)])
      >>> float(both["q"]["scale"]), adapted(jnp.zeros((4, 3)), both["q"])[0].tolist()
      (1.0, [0.75, 0.75, 0.75])
    """
    parts: dict[str, list[tuple[Any, Any]]] = {}
    for adapter, weight in adapters:
        for layer, leaves in layers(adapter).items():
            if "m" in leaves:
                raise ValueError(f"the adapter of {layer} is a DoRA, whose change is no sum; merge each into a base")
            leaves = folded(leaves)
            b = (weight * leaves["scale"])[..., None, None] * leaves["b"]
            parts.setdefault(layer, []).append((leaves["a"], b))
    if not parts:
        raise ValueError("there is no adapter to add up; give (adapter, weight) pairs")
    sums = {}
    for layer, pairs in parts.items():
        sums[f"{layer}/a"] = _joined([a for a, _ in pairs], axis=-1)
        sums[f"{layer}/b"] = _joined([b for _, b in pairs], axis=-2)
        sums[f"{layer}/scale"] = np.ones(pairs[0][0].shape[:-2], np.float32)
    return tree.nest(sums)


def _joined(arrays: Sequence[Any], axis: int) -> Any:
    """Concatenates what is on the host there, and what is on devices there."""
    host = all(isinstance(x, np.ndarray) for x in arrays)
    return np.concatenate(arrays, axis) if host else jnp.concatenate(arrays, axis)
