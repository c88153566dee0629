"""The reward model: scores of two answers, of which the chosen one is to be higher."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxsft.losses.scored import Losses


def bradley_terry(
    chosen: Float[Array, "N"],
    rejected: Float[Array, "N"],
    *,
    margin: Float[Array, "N"] | float = 0.0,
    center: float = 0.0,
    exists: Bool[Array, "N"] | None = None,
) -> Losses:
    """-log sigmoid(chosen - rejected - margin) + center (chosen + rejected)^2.

    Only the difference of two scores means anything; `center` pulls their mean towards 0.

    Args:
      chosen: scores of the chosen answers.
      rejected: of the rejected ones.
      margin: by how much a pair's chosen answer is better, where the data say so.
      center: weight of the square (TRL: center_rewards_coefficient; 0.01 is usual).
      exists: False for pairs that only fill up the batch; all are 0 there.

    Returns:
      (losses [N], metrics [N]): `accuracy`, 1 where chosen is above rejected; `margin`, chosen - rejected; `score`, the
      mean of the two; `score_chosen` and `score_rejected`.

    Example:
      >>> loss, metrics = bradley_terry(jnp.array([1.0]), jnp.array([1.0]), center=0.01)
      >>> round(float(loss[0]), 4), float(metrics["accuracy"][0])  # log 2 + 0.04; a tie is not right
      (0.7331, 0.0)

    Source: Ouyang et al. 2022, arXiv:2203.02155, equation 1; margin: Touvron et al. 2023, arXiv:2307.09288, equation 2;
    center: Eisenstein et al. 2023, arXiv:2312.09244, equation 2. LLaMA-Factory has neither.
    """
    exists = jnp.ones(chosen.shape, bool) if exists is None else exists
    known = lambda x: jnp.where(exists, x, 0.0)
    chosen, rejected, margin = known(chosen), known(rejected), known(margin)
    gap = chosen - rejected
    loss = -jax.nn.log_sigmoid(gap - margin) + center * (chosen + rejected) ** 2
    metrics = {
        "accuracy": jnp.where(gap > 0, 1.0, 0.0),  # a pair that does not exist has no gap
        "margin": gap,
        "score": (chosen + rejected) / 2,
        "score_chosen": chosen,
        "score_rejected": rejected,
    }
    return known(loss), metrics
