"""Which layers get an adapter, how wide and how strong it is, and how its leaves are sharded.

A layer is named by its address without the weight: `blocks/0-7/attn/q`, `embed`, `head`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
from jax.sharding import PartitionSpec

from jaxsft import tree

ALL = ".*/(q|k|v|qkv|o|gate|up|gate_up|down)"
TRAINABLE = "lora/.*/(a|b|m)"
Rules = tuple[tuple[str, PartitionSpec], ...]


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
    """the layers that get one: a regular expression over addresses such as blocks/0-7/attn/q, embed or head; all
    means every linear layer of the blocks"""
    rslora: bool = False
    """scale by alpha / sqrt(rank) instead (Kalajdzievski 2023, arXiv:2312.03732, theorem 3.2)"""
    dora: bool = False
    """learn the norm of each column of W + B A apart from its direction (Liu et al. 2024, arXiv:2402.09353, eq. 5)"""
    init: Literal["lora", "pissa", "olora"] = "lora"
    """where A and B start: lora: B A = 0; pissa: at W's largest singular values (Meng et al. 2024, arXiv:2404.02948,
    eq. 2-4); olora: at its QR (Büyükakyüz 2024, arXiv:2406.01775); what they start at is subtracted, W stays"""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """other ranks for some layers: {regular expression over addresses: rank}, the first that matches counts"""
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """other alphas for some layers, likewise"""


def rank(spec: LoRA, layer: str) -> int:
    """The rank of a layer's adapter.

    Example:
      >>> rank(LoRA(rank=16, rank_pattern={".*/mlp/.*": 4}), "blocks/0-7/mlp/up")
      4
    """
    return _of(spec.rank_pattern, layer, spec.rank)


def scale(spec: LoRA, layer: str) -> float:
    """The factor on B A in a layer.

    Example:
      >>> scale(LoRA(rank=16, alpha=32.0), "q"), scale(LoRA(rank=16, alpha=32.0, rslora=True), "q")
      (2.0, 8.0)
    """
    alpha, r = _of(spec.alpha_pattern, layer, spec.alpha), rank(spec, layer)
    return alpha / (math.sqrt(r) if spec.rslora else r)


def _of(patterns: Mapping[str, Any], layer: str, default: Any) -> Any:
    return next((value for pattern, value in patterns.items() if tree.matches(pattern, layer)), default)


def matrix(params: Mapping, layer: str) -> Any:
    """A layer's weight as [.., in, out]: a kernel, the embedding [V, D], the output layer's table turned to [D, V].

    Raises:
      ValueError: the model has no such layer.
    """
    leaves = tree.flat(params)
    if f"{layer}/kernel" in leaves:
        return leaves[f"{layer}/kernel"]
    if layer == "head":  # a tied one has no table of its own
        table = leaves["head/table" if "head/table" in leaves else "embed/table"]
        shape = isinstance(table, jax.ShapeDtypeStruct)
        return jax.ShapeDtypeStruct(table.shape[::-1], table.dtype) if shape else table.T
    if f"{layer}/table" not in leaves:
        raise ValueError(f"the adapter at {layer} has no kernel to merge into; was it made for another model?")
    return leaves[f"{layer}/table"]


def targets(params: Mapping, spec: LoRA) -> list[str]:
    """The layers that get an adapter.

    Raises:
      ValueError: the pattern matches none, or a rank's or alpha's pattern none of those.
    """
    leaves = tree.flat(params)
    scores = "score/kernel" in leaves  # of a reward model: it trains whole, and there is no output layer
    layers = [p.removesuffix("/kernel") for p in leaves if p.endswith("/kernel") and p != "score/kernel"]
    layers += ["embed", "head"][: 1 if scores else 2] if "embed/table" in leaves else []
    pattern = ALL if spec.targets == "all" else spec.targets
    chosen = [layer for layer in layers if tree.matches(pattern, layer)]
    if not chosen:
        raise ValueError(f"tuning.lora.targets {pattern!r} matches no layer; there are {', '.join(layers)}")
    for name in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(spec, name):
            if not any(tree.matches(pattern, layer) for layer in chosen):
                raise ValueError(f"tuning.lora.{name} {pattern!r} matches none of {', '.join(chosen)}")
    return chosen


def rules(params: Rules) -> Rules:
    """Sharding rules of an adapter from those of the weights: A is cut as W's input is, B and m as its output."""
    made = []
    for pattern, spec in params:
        if pattern.endswith("/kernel"):
            made += _rules(pattern.removesuffix("/kernel"), spec)
    for layer in ("embed", "head"):
        fits = [spec for path in (f"{layer}/table", "embed/table") for p, spec in params if tree.matches(p, path)]
        if fits:
            made += _rules(layer, fits[0] if layer == "embed" else PartitionSpec(*reversed(fits[0])))
    return tuple(made)


def _rules(layer: str, kernel: PartitionSpec) -> Rules:
    *stack, n_in, n_out = kernel
    return (
        (f"{layer}/a0?", PartitionSpec(*stack, n_in, None)),
        (f"{layer}/b0?", PartitionSpec(*stack, None, n_out)),
        (f"{layer}/m", PartitionSpec(*stack, n_out)),
        (f"{layer}/scale", PartitionSpec(*stack)),
    )
