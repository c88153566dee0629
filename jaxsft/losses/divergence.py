"""f-divergences: how the distance from the reference is measured.

DPO keeps the policy near its reference by reverse KL. For another divergence with generator f the reward is
beta f'(policy / reference), plus what depends on the prompt alone and cancels between two answers to it:

    reverse_kl        f'(t) = log t + 1
    forward_kl        f'(t) = -1/t
    js_divergence     f'(t) = log(2t / (t + 1))
    alpha_divergence  f'(t) = (t^(a - 1) - 1) / (a - 1); its limit at a = 1 is log t

So losses of the difference of two rewards have such a form, and others do not. The constants are TRL's, which are zero
at t = 1; they matter where answers are divided by their lengths first (ipo, sigmoid_norm).

Source: Wang et al. 2023, "Beyond Reverse KL", arXiv:2309.16240, theorem 1 and table 1.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
LARGEST = 80.0  # exponent that float32 holds, and TRL's


def score(ratio: Float[Array, "N"], divergence: str, alpha: float) -> Float[Array, "N"]:
    """f'(t) for t = exp(ratio), up to a constant: 0 where policy and reference agree.

    Args:
      ratio: log policy / reference of an answer.
      divergence: one of DIVERGENCES.
      alpha: the order of `alpha_divergence`.

    Raises:
      ValueError: there is no such divergence.

    Example:
      >>> [round(float(score(jnp.log(2.0), name, 0.5)), 3) for name in DIVERGENCES]
      [0.693, 0.5, 0.288, 0.586]

    Where TRL differs: its forward_kl has no bound on the exponent, and is infinite below a ratio of -88.
    """
    if divergence == "reverse_kl" or (divergence == "alpha_divergence" and abs(alpha - 1) < 1e-6):
        return ratio
    if divergence == "forward_kl":
        return 1 - jnp.exp(jnp.minimum(-ratio, LARGEST))
    if divergence == "js_divergence":
        return math.log(2) + jax.nn.log_sigmoid(ratio)
    if divergence == "alpha_divergence":
        return (jnp.exp(jnp.minimum((alpha - 1) * ratio, LARGEST)) - 1) / (alpha - 1)
    raise ValueError(f"divergence is {divergence}; it must be one of {', '.join(DIVERGENCES)}")
