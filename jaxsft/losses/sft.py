"""Supervised fine-tuning: the negative log-likelihood of the tokens to learn."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def sft(logprobs: Float[Array, "B T"], mask: Bool[Array, "B T"]) -> Float[Array, "B T"]:
    """-lp of each token that counts, 0 for the others; divide the sum by `mask.sum()` over the whole step, once.

    The mean over a step is sum(loss) / sum(mask) over all its microbatches and devices. A mean of microbatch means
    weighs a token by how many neighbours it happened to have (transformers #34191).

    Args:
      logprobs: log-probability of each position's target.
      mask: which positions count.

    Example:
      >>> loss = sft(jnp.log(jnp.array([[0.5, 0.25]])), jnp.array([[True, False]]))
      >>> [round(float(x), 3) for x in loss[0]]
      [0.693, 0.0]
    """
    return jnp.where(mask, -logprobs, 0.0)
