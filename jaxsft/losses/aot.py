"""AOT: preference between distributions. Sorted scores are compared, the smallest with the smallest and so on.

    aot           policy margins  lp_chosen - lp_rejected     against  those of the reference
    aot_unpaired  chosen log-ratios, log policy / reference   against  rejected log-ratios

The first side is to dominate the second at every quantile. A pair's loss so depends on all pairs of the step: these
are COUPLED, and a step cut into microbatches must sort before it is cut.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxsft.losses.dpo import smoothed
from jaxsft.losses.scored import Losses, Scored, existing, ratios, result


def aot(pairs: Scored, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Losses:
    """(1 - eps) (-log sigmoid(beta d)) + eps (-log sigmoid(-beta d)), d = sorted policy - sorted reference margins.

    Args:
      pairs: all N of the step.
      beta: as in `sigmoid`.
      label_smoothing: eps.

    Returns:
      (losses [N], metrics [N]): the loss of the pair whose policy margin it is about.

    Example:
      >>> zeros, ones, margin = jnp.zeros(2), jnp.ones(2), jnp.array([1.0, 3.0])
      >>> pairs = Scored(margin, zeros, margin[::-1], zeros, ones, ones, ones > 0)
      >>> [round(x, 4) for x in aot(pairs)[0].tolist()]  # the same margins, in whatever order
      [0.6931, 0.6931]

    Source: Melnyk et al. 2024, arXiv:2406.05882, section 3.
    """
    pairs = existing(pairs)
    chosen, rejected = ratios(pairs)
    of_policy, of_reference = pairs.chosen - pairs.rejected, pairs.ref_chosen - pairs.ref_rejected
    gap = _above(of_policy, of_reference, pairs.exists)
    return result(pairs, smoothed(beta * gap, label_smoothing), (beta * chosen, beta * rejected))


def aot_unpaired(pairs: Scored, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Losses:
    """The same with d = sorted chosen - sorted rejected log-ratios; which answer belongs to which does not matter.

    Example:
      >>> zeros, ones, ratio = jnp.zeros(2), jnp.ones(2), jnp.array([1.0, 3.0])
      >>> pairs = Scored(ratio, ratio[::-1], zeros, zeros, ones, ones, ones > 0)
      >>> [round(x, 4) for x in aot_unpaired(pairs)[0].tolist()]
      [0.6931, 0.6931]

    Source: Melnyk et al. 2024, arXiv:2406.05882, section 3.
    """
    pairs = existing(pairs)
    chosen, rejected = ratios(pairs)
    gap = _above(chosen, rejected, pairs.exists)
    return result(pairs, smoothed(beta * gap, label_smoothing), (beta * chosen, beta * rejected))


def _above(values: Float[Array, "N"], others: Float[Array, "N"], exists: Bool[Array, "N"]) -> Float[Array, "N"]:
    """By how much each value is above the one of `others` that has the same rank among those that exist.

    values 1 4 2, others 0 7 3: sorted 1 2 4 and 0 3 7, so 1-0, 4-7, 2-3.
    """
    last = lambda x: jnp.where(exists, x, jnp.inf)
    rank = jnp.argsort(jnp.argsort(last(values)))
    rival = jnp.sort(last(others))[rank]
    return values - jnp.where(exists, rival, 0.0)  # before any difference, as inf - inf is no number
