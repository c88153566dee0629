"""Weights: of pairs by how likely the policy itself is to write them, and of tokens by where they stand.

WPO makes training on answers that somebody else wrote resemble training on the policy's own: a pair's loss is weighed
by the probability of both answers, each token's relative to what the policy would expect of a choice of its own. LD-DPO
counts less of what a longer answer says beyond the length of the shorter one.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxsft.losses.chunks import Head, Table
from jaxsft.losses.logprobs import everything


def wpo(logprobs: Float[Array, "*N"], collisions: Float[Array, "*N"], count: Float[Array, "*N"]) -> Float[Array, "*N"]:
    """An answer's weight, exp(mean_t(lp_t - log sum_v p_v^2)), without gradient; a pair's is that of both multiplied.

    Args:
      logprobs: of answers under the policy, summed over their tokens.
      collisions: from `collision`, summed likewise.
      count: tokens of each answer; one without any has weight 1.

    Example:
      >>> half = 2 * jnp.log(jnp.full(1, 0.5))
      >>> wpo(half, half, jnp.full(1, 2.0)).tolist()  # two tokens, of one of two that are as likely
      [1.0]

    Source: Zhou et al. 2024, arXiv:2406.11827, equation 2, with the alignment of section 3.2, as in TRL.
    """
    return jax.lax.stop_gradient(jnp.exp((logprobs - collisions) / jnp.maximum(count, 1)))


def collision(
    features: Float[Array, "B T D"], table: Table, mask: Bool[Array, "B T"], **head: Any
) -> Float[Array, "B T"]:
    """log sum_v p_v^2, how likely two draws are to agree, float32, for the tokens in `mask`; 0 for the others.

    Without gradient, and in chunks like `logprobs`, of which it takes the same arguments.

    Example:
      >>> features, table = jnp.ones((1, 3, 2)), jnp.zeros((5, 2))
      >>> found = collision(features, table, jnp.array([[True, True, False]]))
      >>> [round(float(x), 3) for x in found[0]]  # five, all equally likely: log 1/5
      [-1.609, -1.609, 0.0]
    """
    nothing = jnp.zeros(mask.shape, jnp.int32)
    features, table = jax.lax.stop_gradient((features, table))
    return everything(features, table, nothing, mask, Head(**head), frozenset({"collision"})).collision


def ld_weights(index: Int[Array, "*N"], shortest: Int[Array, "*N"], alpha: float) -> Float[Array, "*N"]:
    """LD-DPO's weight of each token of an answer: 1 up to the length of the pair's shorter one, alpha behind.

        answer    a b c d e        index     0 1 2 3 4
        shortest  3                weights   1 1 1 alpha alpha

    Policy and reference are weighed alike, as in TRL (LLaMA-Factory leaves the reference as it is).

    Args:
      index: of the token in its answer; tokens of the prompt are for the mask to leave out.
      shortest: min(|y_c|, |y_r|) of the pair that the token stands in.
      alpha: 1 is DPO; 0 cuts the longer answer.

    Raises:
      ValueError: `alpha` is not in [0, 1].

    Example:
      >>> ld_weights(jnp.arange(5), jnp.array(3), 0.5).tolist()
      [1.0, 1.0, 1.0, 0.5, 0.5]

    Source: Liu et al. 2024, arXiv:2409.06411, section 3.2.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}; LD-DPO's is between 0, which cuts the longer answer, and 1, which is DPO")
    return jnp.where(index < shortest, 1.0, alpha).astype(jnp.float32)
