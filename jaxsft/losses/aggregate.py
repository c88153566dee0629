"""From the losses of tokens to the loss of a step: what each token weighs, and what the sum is divided by.

    token       a mean over the step's tokens; an episode weighs as much as it is long
    sequence    a mean over episodes of the mean over their tokens; a token of a long answer weighs less than one of a
                short one
    fixed       a mean over episodes of the sum over their tokens, by a length that is the same for all: neither

Sums, so that a step may be cut as one likes. An episode whose every token is masked, such as one that was cut off and
is not to be learned from, still counts among episodes, as in TRL: `sequence` and `fixed` are smaller by its share,
`token` never knew it. Rows that only fill up a batch have no episodes, and padding none.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxsft.losses.episodes import episode_count, episode_sum

AGGREGATES = ("token", "sequence", "fixed")


class LossType(NamedTuple):
    """A policy loss and the sum over tokens that belongs to it."""

    policy: str  # of POLICY
    aggregate: str  # of AGGREGATES


LOSS_TYPES: dict[str, LossType] = {
    "ppo": LossType("ppo", "token"),
    "grpo": LossType("ppo", "sequence"),  # Shao et al. 2024, arXiv:2402.03300, equation 3
    "dr_grpo": LossType("ppo", "fixed"),  # Liu et al. 2025, arXiv:2503.20783, section 3.2
    "dapo": LossType("ppo", "token"),  # Yu et al. 2025, arXiv:2503.14476, equation 8
    "bnpo": LossType("ppo", "token"),  # TRL's name; its mean is over a microbatch, so that here it is dapo
    "cispo": LossType("cispo", "token"),  # MiniMax 2025, arXiv:2506.13585, equation 4
    "gspo": LossType("gspo", "sequence"),  # Zheng et al. 2025, arXiv:2507.18071, equation 5
    "rloo": LossType("rloo", "sequence"),  # Ahmadian et al. 2024, arXiv:2402.14740
    "reinforce++": LossType("ppo", "token"),  # Hu et al. 2025, arXiv:2501.03262
}


def aggregate(
    name: str, mask: Bool[Array, "B T"], segments: Int[Array, "B T"], *, max_new_tokens: int | None = None
) -> tuple[Float[Array, "B T"], Float[Array, ""]]:
    """What each token weighs, and by what the weighted sum of a step is divided.

    Args:
      name: one of AGGREGATES.
      mask: which tokens are learned.
      segments: which episode each token belongs to, numbered from 1 in each row; 0 for padding.
      max_new_tokens: the length of `fixed`: that of the longest answer which may be sampled.

    Returns:
      (weights, total): the step's loss is sum(loss * weights) / total, each summed over all of its microbatches.

    Raises:
      ValueError: no such name; `fixed` without a length.

    Example:
      >>> segments, mask = jnp.array([[1, 1, 1, 2, 2, 0]]), jnp.array([[1, 1, 0, 1, 0, 0]]) > 0
      >>> for name in AGGREGATES:
      ...     weights, total = aggregate(name, mask, segments, max_new_tokens=4)
      ...     print(weights.tolist(), float(total))
      [[1.0, 1.0, 0.0, 1.0, 0.0, 0.0]] 3.0
      [[0.5, 0.5, 0.0, 1.0, 0.0, 0.0]] 2.0
      [[0.25, 0.25, 0.0, 0.25, 0.0, 0.0]] 2.0
    """
    learned = mask.astype(jnp.float32)
    if name == "token":
        return learned, learned.sum()
    if name == "sequence":
        return learned / jnp.maximum(episode_sum(learned, mask, segments), 1), episode_count(segments)
    if name == "fixed" and max_new_tokens:
        return learned / max_new_tokens, episode_count(segments)
    if name == "fixed":
        raise ValueError("the aggregate fixed divides by max_new_tokens, the length of the longest answer; give it")
    raise ValueError(f"there is no aggregate '{name}'; there are {', '.join(AGGREGATES)}")
