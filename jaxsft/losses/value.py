"""The value model: what is to be expected of an episode, at each of its tokens."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


class ValueLoss(NamedTuple):
    """Of every token; 0 and False where the mask is False."""

    loss: Float[Array, "*N"]
    clipped: Bool[Array, "*N"]  # the clipped value is the worse one, so the token has no gradient


def clipped_value(
    values: Float[Array, "*N"],
    old: Float[Array, "*N"],
    returns: Float[Array, "*N"],
    mask: Bool[Array, "*N"],
    *,
    clip: float | None = 0.2,
) -> ValueLoss:
    """max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2) / 2 of each token.

    Args:
      values: V, of the model that learns.
      old: V_old, of the rollout.
      returns: R, from `gae`.
      mask: which tokens count.
      clip: c, how far a value may go in the updates on one rollout; None leaves it free. It is in units of the reward.

    Returns:
      (loss, clipped); divide sums by the number of tokens of the step.

    Example:
      >>> one = jnp.ones(1)
      >>> loss, clipped = clipped_value(0.5 * one, 0 * one, one, one > 0)  # half the way, where a fifth is allowed
      >>> round(float(loss[0]), 3), bool(clipped[0])
      (0.32, True)

    Source: Schulman et al. 2017, arXiv:1707.06347, in the form of openai/baselines, ppo2.
    """
    known = lambda x: jnp.where(mask, x, 0.0).astype(jnp.float32)
    values, old, returns = known(values), known(old), known(returns)
    free = (values - returns) ** 2
    if clip is None:
        return ValueLoss(free / 2, jnp.zeros(free.shape, bool))
    held = (jnp.clip(values, old - clip, old + clip) - returns) ** 2
    return ValueLoss(jnp.maximum(free, held) / 2, held > free)


def explained_variance(
    values: Float[Array, "*N"], returns: Float[Array, "*N"], mask: Bool[Array, "*N"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """How much of the variance of returns the values foresee: 1 all, 0 as much as a constant would, below 0 less.

    Args:
      values: as they were when the rollout was made.
      returns: of the rollout.
      mask: which tokens count.

    Returns:
      (explained, total): sums of squares, sum (R - mean)^2 - sum (R - V - mean)^2 and the former alone. Their quotient
      is the share; of several pieces, sum both first.

    Example:
      >>> explained, total = explained_variance(jnp.array([1.0, 2.0]), jnp.array([1.0, 3.0]), jnp.array([True, True]))
      >>> float(explained / total)
      0.75
    """
    known = lambda x: jnp.where(mask, x, 0.0).astype(jnp.float32)
    values, returns = known(values), known(returns)
    count = jnp.maximum(mask.sum(), 1)

    def squares(x: Array) -> Array:
        return (known(x - x.sum() / count) ** 2).sum()

    total = squares(returns)
    return total - squares(returns - values), total
