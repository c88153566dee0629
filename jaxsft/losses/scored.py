"""What the losses of preferences see: how likely two answers are to the policy and to the reference.

A batch is filled up with pairs that do not exist. A loss reads all arrays through `existing`, which puts a harmless
value there, and returns through `result`, which makes zero of whatever came out: so such a pair has no loss, no metrics
and no gradient, and no NaN arises that a later zero could not undo.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

Losses = tuple[Float[Array, "N"], dict[str, Float[Array, "N"]]]  # of each pair, with its metrics


class Scored(NamedTuple):
    """Log-probabilities of N pairs, each summed over the answer's tokens, float32 in nats."""

    chosen: Float[Array, "N"]
    rejected: Float[Array, "N"]
    ref_chosen: Float[Array, "N"]  # of the reference; zeros for losses that have none
    ref_rejected: Float[Array, "N"]
    chosen_count: Float[Array, "N"]  # tokens of the answer
    rejected_count: Float[Array, "N"]
    exists: Bool[Array, "N"]  # False: only fills up the batch


def existing(pairs: Scored) -> Scored:
    """The same pairs, with two answers of one token and probability 1/e where none exists."""
    held = lambda x, other: jnp.where(pairs.exists, x, other)
    logprobs = (held(x, -1.0) for x in pairs[:4])
    counts = (held(jnp.maximum(x, 1.0), 1.0) for x in pairs[4:6])
    return Scored(*logprobs, *counts, exists=pairs.exists)


def ratios(pairs: Scored) -> tuple[Float[Array, "N"], Float[Array, "N"]]:
    """log policy / reference of the chosen and of the rejected answers."""
    return pairs.chosen - pairs.ref_chosen, pairs.rejected - pairs.ref_rejected


def averages(pairs: Scored) -> tuple[Float[Array, "N"], Float[Array, "N"]]:
    """The policy's log-probability a token, of the chosen and of the rejected answers."""
    return pairs.chosen / pairs.chosen_count, pairs.rejected / pairs.rejected_count


def result(
    pairs: Scored,
    loss: Float[Array, "N"],
    rewards: tuple[Float[Array, "N"], Float[Array, "N"]],
    **metrics: Float[Array, "N"],
) -> Losses:
    """The loss and the metrics, 0 where no pair exists.

    Example:
      >>> ones = jnp.ones(2)
      >>> pairs = Scored(*[ones] * 6, exists=jnp.array([True, False]))
      >>> loss, metrics = result(pairs, ones, (ones, -ones), log_odds=ones)
      >>> loss.tolist(), metrics["rewards_rejected"].tolist()
      ([1.0, 0.0], [-1.0, 0.0])
    """
    known = lambda x: jnp.where(pairs.exists, x, 0.0)
    metrics = {"rewards_chosen": rewards[0], "rewards_rejected": rewards[1]} | metrics
    return known(loss), {name: known(value) for name, value in metrics.items()}
