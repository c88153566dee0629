"""The optimizer: AdamW with warmup, a schedule and clipping, built from Optax.

Running statistics of batch norms are no weights: they go a tenth of the way to the batch's in every step, as in torch,
whatever the learning rate is, and neither clipping nor the norm that is logged counts their way.
Source: Loshchilov and Hutter 2017, arXiv:1711.05101. Norm scales and biases do not decay.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import jax.numpy as jnp
import optax

from jaxsft import tree

DECAYS = ".*/(kernel|filters|table|positions|types|a|b|m)"  # m as in PEFT
FOLLOWS = ".*/running_(mean|var)"  # whose gradient is how far they are from the batch's, see `models.vision.layers`
MOMENTUM = 0.1  # torch's, of batch norms
# What LoRA+ learns faster, as in PEFT: B, and vectors. In the embedding's adapter, where A starts at zero, neither is.
FASTER = ("(value/)?lora/(?!embed/).*/b", "(value/)?lora/.*/m", "(value/)?params/.*/(bias|scale)")


@dataclass(frozen=True)
class Config:
    """How parameters are updated."""

    learning_rate: float = 2e-4
    """the peak; about 2e-4 for LoRA, 1e-5 for full tuning of a large model"""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """after the warmup: cosine or linear down to final_ratio of the peak, or constant"""
    warmup_steps: int = 0
    """steps that rise linearly to the peak; the first step already learns"""
    final_ratio: float = 0.0
    """the last learning rate over the peak"""
    weight_decay: float = 0.0
    """of AdamW, on kernels, embeddings and adapters; never on norms and biases"""
    clip: float = 1.0
    """the largest global gradient norm; 0 clips nothing"""
    beta1: float = 0.9
    """decay of the first moment"""
    beta2: float = 0.999
    """decay of the second moment"""
    eps: float = 1e-8
    """added to the root of the second moment"""
    lora_plus: float = 1.0
    """learning rate of an adapter's B over that of A; LoRA+ (Hayou et al. 2024, arXiv:2402.12354) advises about 16"""


def schedule(
    learning_rate: float, kind: str, steps: int, *, warmup_steps: int = 0, final_ratio: float = 0.0
) -> Callable[..., Any]:
    """Makes step -> learning rate.

    Args:
      learning_rate: the peak.
      kind: cosine, linear or constant.
      steps: length of the run; the last one gets about final_ratio of the peak.
      warmup_steps: step s < warmup_steps gets (s + 1) / warmup_steps of the peak.

    Raises:
      ValueError: an unknown kind.

    Example:
      >>> lr = schedule(1.0, "linear", 12, warmup_steps=2)
      >>> [round(float(lr(s)), 2) for s in (0, 1, 2, 7, 12)]
      [0.5, 1.0, 1.0, 0.5, 0.0]
    """
    if kind not in ("cosine", "linear", "constant"):
        raise ValueError(f"optim.schedule {kind!r} is not known; known are cosine, linear, constant")

    def rate(step):
        warm = jnp.minimum(1.0, (step + 1) / max(1, warmup_steps))
        done = jnp.clip((step - warmup_steps) / max(1, steps - warmup_steps), 0.0, 1.0)
        left = {"cosine": (1 + jnp.cos(math.pi * done)) / 2, "linear": 1 - done, "constant": 1.0}[kind]
        return learning_rate * warm * (final_ratio + (1 - final_ratio) * left)

    return rate


def build(config: Config, steps: int) -> tuple[optax.GradientTransformation, Callable[..., Any]]:
    """Builds the chain of a run of `steps` steps.

    Returns:
      (tx, schedule): the transformation, and the learning rate it uses, for the log.

    Raises:
      ValueError: an unknown schedule; a ratio for LoRA+ that is not positive, or, in `tx.init`, no adapter to use it.

    Example:
      >>> tx, rate = build(Config(schedule="constant"), steps=10)
      >>> float(rate(3)) == Config().learning_rate or round(float(rate(3)), 6)
      0.0002
    """
    c = config
    rate = schedule(c.learning_rate, c.schedule, steps, warmup_steps=c.warmup_steps, final_ratio=c.final_ratio)
    if c.lora_plus <= 0:
        raise ValueError(f"optim.lora_plus is {c.lora_plus}; it must be above 0, about 16, or 1 for none")
    decays = lambda params: tree.nest({p: tree.matches(DECAYS, p) for p in tree.flat(params)})
    chain = [optax.clip_by_global_norm(c.clip)] if c.clip else []
    chain.append(optax.adamw(rate, c.beta1, c.beta2, c.eps, weight_decay=c.weight_decay, mask=decays))
    if c.lora_plus != 1:
        chain.append(optax.masked(optax.scale(c.lora_plus), _faster))
    return following(optax.chain(*chain)), rate


def following(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """The same for weights, and plain descent at `MOMENTUM` for running statistics; its state knows the weights alone.

    Example:
      >>> tx = following(optax.sgd(1.0))
      >>> params = {"norm": {"running_mean": jnp.array(1.0), "scale": jnp.array(1.0)}}
      >>> updates, _ = tx.update(params, tx.init(params), params)
      >>> round(float(updates["norm"]["running_mean"]), 2), float(updates["norm"]["scale"])
      (-0.1, -1.0)
    """

    def init(params):
        return tx.init(weights(params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        own = weights(updates)
        moves, state = tx.update(own, state, None if params is None else weights(params))
        if own is updates:
            return moves, state
        follow = {path: -MOMENTUM * x for path, x in tree.flat(updates).items() if tree.matches(FOLLOWS, path)}
        return tree.combine(cast(tree.Tree, moves), tree.nest(follow)), state

    return optax.GradientTransformation(init, update)


def weights(leaves: Any) -> Any:
    """A tree without running statistics; the very same where it has none."""
    flat = tree.flat(leaves) if isinstance(leaves, Mapping) else {}
    kept = {path: x for path, x in flat.items() if not tree.matches(FOLLOWS, path)}
    return leaves if len(kept) == len(flat) else tree.nest(kept)


def _faster(params: Mapping) -> tree.Tree:
    found = {path: tree.matches(FASTER, path) for path in tree.flat(params)}
    if not any(found[path] for path in found if path.startswith("lora/")):
        raise ValueError("optim.lora_plus is for adapters of linear layers, and none trains; leave it at 1")
    return tree.nest(found)
