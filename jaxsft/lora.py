"""Low-rank adapters: h = W0 x + scale B A x, W0 frozen (Hu et al. 2021, arXiv:2106.09685, eq. 3).

An adapter is a tree beside the parameters, at the same addresses:

    params/blocks/0-7/attn/q/kernel   [8, in, out]
    lora/blocks/0-7/attn/q/a          [8, in, r]     uniform in +-1/sqrt(in), as PEFT draws it
    lora/blocks/0-7/attn/q/b          [8, r, out]    zero: at first, x A B adds exactly nothing
    lora/blocks/0-7/attn/q/scale      [8]            alpha / r; a constant, kept here so that a tree says all of itself

What trains is `TRAINABLE`; since the base is another tree, "only A and B receive updates" holds by construction.
"""

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxsft import tree
from jaxsft.tree import Tree
from jaxsft.types import Key

ALL = ".*/(q|k|v|o|gate|up|down)"
TRAINABLE = "lora/.*/(a|b)"


@dataclass(frozen=True)
class LoRA:
    """The shape of an adapter."""

    rank: int = 16
    """r, the inner width of B A"""
    alpha: float = 32.0
    """B A is scaled by alpha / rank"""
    dropout: float = 0.0
    """rate of the dropout on the input of A while training"""
    targets: str = "all"
    """the layers that get one: a regular expression over addresses such as blocks/0-7/attn/q, or all"""
    rslora: bool = False
    """scale by alpha / sqrt(rank) instead (Kalajdzievski 2023, arXiv:2312.03732, theorem 3.2)"""


def scale(spec: LoRA) -> float:
    """The factor on B A.

    Example:
      >>> scale(LoRA(rank=16, alpha=32.0)), scale(LoRA(rank=16, alpha=32.0, rslora=True))
      (2.0, 8.0)
    """
    return spec.alpha / (math.sqrt(spec.rank) if spec.rslora else spec.rank)


def targets(params: Mapping, spec: LoRA) -> list[str]:
    """The addresses of the layers whose kernel gets an adapter.

    Raises:
      ValueError: the pattern matches none.
    """
    layers = [p.removesuffix("/kernel") for p in tree.flat(params) if p.endswith("/kernel")]
    pattern = ALL if spec.targets == "all" else spec.targets
    chosen = [layer for layer in layers if tree.matches(pattern, layer)]
    if not chosen:
        raise ValueError(f"tuning.lora.targets {pattern!r} matches no layer; there are {', '.join(layers)}")
    return chosen


def init(key: Key, params: Mapping, spec: LoRA) -> Tree:
    """Makes a fresh adapter for the layers that `spec.targets` chooses.

    Args:
      key: of jax.random.key.
      params: the base's parameters, or shapes of them.
      spec: rank, alpha, targets.

    Returns:
      the tree for `variables["lora"]`, float32.

    Raises:
      ValueError: the rank is below 1 or the targets match nothing.

    Example:
      >>> params = {"q": {"kernel": jnp.ones((4, 3))}}
      >>> adapter = init(jax.random.key(0), params, LoRA(rank=2, targets="q"))
      >>> {path: leaf.shape for path, leaf in tree.flat(adapter).items()}
      {'q/a': (4, 2), 'q/b': (2, 3), 'q/scale': ()}
    """
    if spec.rank < 1:
        raise ValueError(f"tuning.lora.rank is {spec.rank}; it must be at least 1")
    leaves, kernels = {}, tree.flat(params)
    for layer in targets(params, spec):
        *stack, n_in, n_out = kernels[f"{layer}/kernel"].shape
        bound = 1 / math.sqrt(n_in)
        own = jax.random.fold_in(key, zlib.crc32(layer.encode()))
        leaves[f"{layer}/a"] = jax.random.uniform(own, (*stack, n_in, spec.rank), jnp.float32, -bound, bound)
        leaves[f"{layer}/b"] = jnp.zeros((*stack, spec.rank, n_out), jnp.float32)
    return with_scale(tree.nest(leaves), spec)


def with_scale(adapter: Mapping, spec: LoRA) -> Tree:
    """Completes a tree of A and B, as it trains, with the scales that stay."""
    leaves = tree.flat(adapter)
    scales = {
        f"{p[:-2]}/scale": jnp.full(x.shape[:-2], scale(spec), jnp.float32)
        for p, x in leaves.items()
        if p.endswith("/a")
    }
    return tree.nest(leaves | scales)


def merge(variables: Mapping) -> Tree:
    """Folds the adapter into the kernels: W + scale A B, added in float32 and cast once.

    Args:
      variables: {"params": ..., "lora": ...}.

    Returns:
      params whose model answers as base and adapter together did.

    Raises:
      ValueError: an adapter at an address where there is no kernel.

    Example:
      >>> lora = {"q": {"a": jnp.ones((4, 2)), "b": jnp.ones((2, 3)), "scale": jnp.float32(0.5)}}
      >>> merge({"params": {"q": {"kernel": jnp.ones((4, 3))}}, "lora": lora})["q"]["kernel"][0]
      Array([2., 2., 2.], dtype=float32)
    """
    params, lora = tree.flat(variables["params"]), tree.flat(variables.get("lora", {}))
    for path in [p for p in lora if p.endswith("/a")]:
        layer = path.removesuffix("/a")
        if f"{layer}/kernel" not in params:
            raise ValueError(
                f"the adapter at {layer} has no kernel to merge into; was it made for another model, or is the kernel "
                "packed? Then hub.merge folds it into the base's files"
            )
        kernel = params[f"{layer}/kernel"]
        change = delta(lora[path], lora[f"{layer}/b"], lora[f"{layer}/scale"])
        params[f"{layer}/kernel"] = (kernel.astype(jnp.float32) + change).astype(kernel.dtype)
    return tree.nest(params)


def delta(a, b, scale):
    """scale A B of one layer or of a stack of them, in float32; works on numpy and jax arrays alike."""
    return scale[..., None, None] * (a.astype("float32") @ b.astype("float32"))


def rules(params: tuple[tuple[str, PartitionSpec], ...]) -> tuple[tuple[str, PartitionSpec], ...]:
    """Sharding rules of an adapter from those of the kernels: A is cut as W's input is, B as its output."""
    made = []
    for pattern, spec in params:
        if pattern.endswith("/kernel"):
            layer, (*stack, n_in, n_out) = pattern.removesuffix("/kernel"), spec
            made += [
                (f"{layer}/a", PartitionSpec(*stack, n_in, None)),
                (f"{layer}/b", PartitionSpec(*stack, None, n_out)),
                (f"{layer}/scale", PartitionSpec(*stack)),
            ]
    return tuple(made)
