"""What trains: LoRA, everything, or a part, each as a pattern over the addresses of the variables.

lora      lora/.*/(a|b|m)            adapters beside a frozen base, and what patterns name of the base itself
full      params/.*
partial   params/blocks/6-7/.*       the last two of eight layers; the backward pass ends there
          params/(.*norm/scale)      or whatever patterns say
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import jax
from jax.sharding import Mesh

from jaxsft import lora, quant, sharding, tree
from jaxsft.lora import LoRA
from jaxsft.models import TABLES, Model
from jaxsft.tree import Pattern, Tree
from jaxsft.types import Key


@dataclass(frozen=True)
class Config:
    """Which parameters learn."""

    method: Literal["lora", "full", "partial"] = "lora"
    """lora: low-rank adapters; full: every weight; partial: the layers or trainable patterns below"""
    lora: LoRA = LoRA()
    layers: int | None = None
    """partial and lora: only the last n layers, or with a negative number only the first n"""
    trainable: list[str] = field(default_factory=list)
    """partial: regular expressions over addresses, such as blocks/.*/attn/.* or .*norm/scale; lora: what trains of the
    base beside the adapter, PEFT's modules_to_save, such as embed/table, head/table, .*/bias"""


class Plan(NamedTuple):
    """A configuration, made concrete for a model of some depth."""

    trainable: Pattern  # over the addresses of {"params": ..., "lora": ...}
    cut: int | None  # the layer before which the stack is cut, so that the parts can differ
    lora: LoRA | None


class Learner(NamedTuple):
    """A model, and its variables split by what learns."""

    model: Model
    plan: Plan
    trainable: Tree
    frozen: Tree

    @property
    def variables(self) -> Tree:
        return tree.combine(self.trainable, self.frozen)


def always(*, labels: int | None = None, new_tokens: bool = False, images: bool = False) -> list[str]:
    """What trains whatever the method is, for `plan(also=...)`: a new head, and tables with new rows.

    Example:
      >>> always(labels=1), always(labels=10, images=True)
      (['score/.*'], ['classifier/.*'])
    """
    return ["classifier/.*" if images else "score/.*"] * bool(labels) + [TABLES] * new_tokens


def plan(config: Config, depth: int, also: Sequence[str] = ()) -> Plan:
    """Decides what trains in a model of `depth` layers.

    Args:
      config: the method, and what it is to change.
      depth: layers of the model.
      also: patterns over the addresses of parameters that train whatever the method is, such as score/.*, the new head
        of a reward model.

    Raises:
      ValueError: settings that contradict each other or the model.

    Example:
      >>> plan(Config(method="partial", layers=2), 8)[:2]
      (['params/blocks/6-7/.*'], 6)
      >>> plan(Config(), 8, also=["score/.*"]).trainable
      ['lora/.*/(a|b|m)', 'params/(score/.*)']
    """
    if config.trainable and config.method == "full":
        raise ValueError("tuning.trainable is for tuning.method lora or partial; the method is full")
    patterns = [f"params/({pattern})" for pattern in (*config.trainable, *also)]
    stack, cut = ("", None) if config.layers is None else _stack(config.layers, depth)
    match config.method:
        case "full":
            if stack:
                raise ValueError("tuning.layers is for tuning.method lora or partial; the method is full")
            return Plan("params/.*", None, None)
        case "partial":
            if not stack and not patterns:
                raise ValueError("tuning.method partial needs tuning.layers or tuning.trainable")
            return Plan([f"params/blocks/{stack}/.*"] * bool(stack) + patterns, cut, None)
        case _:
            spec = config.lora
            if stack:
                inner = lora.ALL if spec.targets == "all" else spec.targets
                spec = dataclasses.replace(spec, targets=f"(?=blocks/{stack}/)({inner})")
            return Plan([lora.TRAINABLE, *patterns], cut, spec)


def _stack(layers: int, depth: int) -> tuple[str, int | None]:
    if not depth:
        raise ValueError(
            f"tuning.layers is {layers}, but this model has stages instead of layers that are alike; name those that "
            "train in tuning.trainable, such as stage3/.*"
        )
    if not 1 <= abs(layers) <= depth:
        raise ValueError(f"tuning.layers is {layers}, but the model has {depth} layers; give 1 to {depth}, or negative")
    if abs(layers) == depth:
        return f"0-{depth - 1}", None
    return (f"{depth - layers}-{depth - 1}", depth - layers) if layers > 0 else (f"0-{-layers - 1}", -layers)


def apply(plan: Plan, base: Mapping, key: Key, *, mesh: Mesh, rules: sharding.Rules) -> tuple[Tree, Tree]:
    """Adds the adapter, if there is one, and splits the variables.

    Args:
      plan: from `plan`.
      base: {"params": ..., "packed": ...}, from `hub.load_variables(cut=plan.cut, full_precision=plan.trainable)`; of
        `hub.abstract` the adapter is abstract as well.
      key: draws the adapter.
      mesh, rules: where the adapter goes; the rules are those of the model's family.

    Returns:
      (trainable, frozen); `tree.combine` of the two are the model's variables.

    Raises:
      ValueError: a pattern that matches nothing, a weight that would train beside its own adapter, or one that is
        packed.
    """
    variables, kernels = dict(base), quant.kernels(base.get("packed", {}))
    quant.check(plan.trainable, tree.flat(kernels))
    if plan.lora:
        make = lambda key, base, spec=plan.lora: lora.init(key, _weights(base), spec)
        low = sharding.abstract(jax.eval_shape(make, key, base), lora.rules(rules), mesh)
        exists = not isinstance(jax.tree.leaves(base)[0], jax.ShapeDtypeStruct)
        variables["lora"] = jax.jit(make, out_shardings=sharding.of(low))(key, base) if exists else low
    trainable, frozen = tree.partition(variables, plan.trainable)
    learns, tied = set(tree.flat(trainable.get("params", {}))), "head" not in base["params"]
    for layer in lora.layers(trainable.get("lora", {})):
        table = "embed/table" if layer == "head" and tied else f"{layer}/table"
        if twice := {f"{layer}/kernel", table} & learns:
            raise ValueError(
                f"{twice.pop()} is in tuning.trainable and has an adapter; take it out of one of the two (new tokens "
                "train the tables, and then it must be tuning.lora.targets)"
            )
    return trainable, frozen


def _weights(base: Mapping) -> Tree:
    """The parameters with what is packed unpacked; where a fresh adapter does not look, nothing is."""
    packed = lora.layers(base.get("packed", {}))
    return tree.combine(base["params"], tree.nest({f"{at}/kernel": quant.unpack(x) for at, x in packed.items()}))


def count(trainable: Tree, frozen: Tree) -> int:
    """Counts parameters and what trains beside them; a packed kernel counts as what it stands for."""
    return sum(tree.count(x) for x in (trainable, frozen.get("params", {}), quant.kernels(frozen.get("packed", {}))))


def describe(plan: Plan, trainable: Tree, frozen: Tree) -> dict[str, str]:
    """What trains, in figures, for people."""
    packed = frozen.get("packed", {})
    kernels = quant.kernels(packed)
    base = {**frozen.get("params", {}), "packed": kernels}  # a packed kernel counts as what it stands for
    learns, rests = tree.count(trainable), tree.count(base)
    named = [plan.trainable] if isinstance(plan.trainable, str) else plan.trainable
    lines = {
        "trains": " ".join(named),
        "parameters that train": f"{learns:,} of {learns + rests:,} ({learns / (learns + rests):.2%})",
        "arrays that train": f"{len(tree.flat(trainable))} of {len(tree.flat(trainable)) + len(tree.flat(base))}",
    }
    if packed:
        n, size = tree.count(kernels), sum(x.nbytes for x in jax.tree.leaves(packed))
        lines["packed"] = f"{n:,} parameters in {size / 1e6:.2f} MB, {8 * size / n:.2f} bits each"
    return lines
