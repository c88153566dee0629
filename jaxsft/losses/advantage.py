"""Advantages: how much better a token, or a whole answer, was than what was to be expected.

Arrays over tokens stand as in episodes.py: an episode's learned positions are contiguous, and at least one that is not
learned lies between two of them, so a scan from the right that is 0 where the mask is False keeps them apart.

Whatever is off the mask is 0 in what comes back and is never looked at, even if it is not finite.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

EPSILON = 1e-4  # beside a standard deviation that rewards are divided by, as in TRL; verl has 1e-6


def gae(
    rewards: Float[Array, "B T"],
    values: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Generalised advantage estimation, from the end of each episode to its beginning.

        delta_t = r_t + gamma V_{t+1} - V_t        A_t = delta_t + gamma lam A_{t+1}        R_t = A_t + V_t

    An episode ends with its last token, whether it was finished or cut: V and A are 0 behind it.

    Args:
      rewards: of each action, in the end the episode's score.
      values: of the state that each action was chosen in.
      mask: which positions are actions.
      gamma: discount of a token.
      lam: 1 looks at all that follows, with much variance; 0 at the next value alone.

    Returns:
      (advantages, returns), float32; returns are what values are to become, so they belong to advantages that are not
      whitened yet.

    Example:
      >>> rewards, values = jnp.array([[0.0, 0.0, 1.0, 9.0]]), jnp.array([[0.5, 0.5, 0.5, 9.0]])
      >>> advantages, returns = gae(rewards, values, jnp.array([[True, True, True, False]]), lam=0.5)
      >>> advantages.tolist(), returns.tolist()
      ([[0.125, 0.25, 0.5, 0.0]], [[0.625, 0.75, 1.0, 0.0]])

    Source: Schulman et al. 2015, arXiv:1506.02438, equation 16. TRL (PPOTrainer, until 1.10) puts the score on the
    state behind the token that ends an answer, where there is room, so that a value of the end is learned, too; here it
    is the reward of that token, as in the paper, and no state lies behind it.
    """
    rewards, values = _known(rewards, mask), _known(values, mask)
    delta = rewards + gamma * _next(values) - values
    advantages = _backwards(delta, mask, gamma * lam)
    return advantages, _known(advantages + values, mask)


def discounted(rewards: Float[Array, "B T"], mask: Bool[Array, "B T"], *, gamma: float = 1.0) -> Float[Array, "B T"]:
    """Returns to go, R_t = r_t + gamma R_{t+1}: what follows of an episode's rewards.

    Example:
      >>> discounted(jnp.array([[1.0, 2.0, 9.0, 4.0]]), jnp.array([[True, True, False, True]]), gamma=0.5).tolist()
      [[2.0, 2.0, 0.0, 4.0]]
    """
    return _backwards(_known(rewards, mask), mask, gamma)


def whiten(x: Float[Array, "*N"], mask: Bool[Array, "*N"], *, keep_mean: bool = False) -> Float[Array, "*N"]:
    """Shifted to mean 0 and scaled to variance 1 over all that counts, together: not row by row.

    Args:
      x: of the whole rollout; a part of it would have a mean of its own.
      mask: what counts.
      keep_mean: scale only, for rewards, whose sign means something.

    Returns:
      float32. The variance is the unbiased one. A single value becomes 0, or stays itself.

    Example:
      >>> [round(x, 3) for x in whiten(jnp.array([1.0, 3.0, jnp.nan]), jnp.array([True, True, False])).tolist()]
      [-0.707, 0.707, 0.0]
    """
    mean, variance = _moments(x, mask)
    centred = (_known(x, mask) - mean) * jax.lax.rsqrt(variance + 1e-8)
    return _known(centred + mean if keep_mean else centred, mask)


def reinforce(rewards: Float[Array, "B T"], mask: Bool[Array, "B T"], *, gamma: float = 1.0) -> Float[Array, "B T"]:
    """REINFORCE++: returns to go, whitened over the whole rollout. No value model, and no group.

    Args:
      rewards: -beta k1 of every token, and the episode's score beside it on the last: `k1` of kl.py.
      mask: which positions are actions.
      gamma: discount of a token.

    Example:
      >>> found = reinforce(jnp.array([[0.0, 1.0], [0.0, -1.0]]), jnp.ones((2, 2), bool))
      >>> [round(x, 3) for x in found.ravel().tolist()]
      [0.866, 0.866, -0.866, -0.866]

    Source: Hu et al. 2025, arXiv:2501.03262, section 3. Its REINFORCE++-baseline, for several answers to a prompt,
    takes each score less its group's mean, `group(scores, scale="none")`, and has the KL divergence beside the loss
    (k2): with gamma 1 and these scores on the last position, it is the same function.
    """
    return whiten(discounted(rewards, mask, gamma=gamma), mask)


def group(rewards: Float[Array, "G n"], *, scale: str = "group") -> Float[Array, "G n"]:
    """GRPO: each answer's reward against the other answers to the same prompt, (R - mean) / (std + 1e-4).

    Args:
      rewards: of n answers to each of G prompts; NaN where an answer has none. Such an answer counts nowhere and has
        advantage 0, and so has one that is alone in its group with a reward.
      scale: what R - mean is divided by: the standard deviation of the "group"; of the "batch", all of G x n; or
        "none", as in Dr. GRPO, where questions that are nearly solved, or hardly, do not weigh more.

    Returns:
      float32. A group whose rewards are all equal is exactly 0: it says nothing, and moves nothing.

    Raises:
      ValueError: there is no such scale.

    Example:
      >>> found = group(jnp.array([[1.0, 0.0, jnp.nan], [0.1, 0.1, 0.1]]))
      >>> [round(x, 3) for x in found.ravel().tolist()]
      [0.707, -0.707, 0.0, 0.0, 0.0, 0.0]

    Source: Shao et al. 2024, arXiv:2402.03300, section 4.1.2; "batch": Liu et al. 2025, arXiv:2508.08221; "none": Liu
    et al. 2025, arXiv:2503.20783, section 3.1.
    """
    if scale not in ("group", "batch", "none"):
        raise ValueError(f"scale is {scale}; advantages are divided by the deviation of the group, the batch, or none")
    scored = ~jnp.isnan(rewards)
    mean, variance = _moments(rewards, scored, axis=1)
    centred = _known(rewards, scored) - mean
    if scale == "batch":
        variance = _moments(rewards, scored)[1]
    divisor = 1.0 if scale == "none" else jnp.sqrt(variance) + EPSILON
    return _known(centred / divisor, scored & _differ(rewards, scored))


def leave_one_out(rewards: Float[Array, "G n"], *, normalise: bool = False) -> Float[Array, "G n"]:
    """RLOO: each answer's reward less the mean of the *other* answers to the same prompt.

    The baseline does not depend on the answer, so the gradient is unbiased. TRL takes the KL divergence from the reward
    first: `rewards - beta * k1`, with k1 summed over the answer's tokens.

    Args:
      rewards: of n answers to each of G prompts; NaN where an answer has none, as in `group`.
      normalise: whiten the advantages over the whole batch, with 1e-4 beside the deviation (TRL: normalize_advantages).

    Example:
      >>> leave_one_out(jnp.array([[1.0, 0.0, 0.5, jnp.nan], [2.0, 2.0, 2.0, 2.0]])).tolist()
      [[0.75, -0.75, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]

    Source: Ahmadian et al. 2024, arXiv:2402.14740, equation 8.
    """
    scored = ~jnp.isnan(rewards)
    known, count = _known(rewards, scored), scored.sum(axis=1, keepdims=True)
    others = (known.sum(axis=1, keepdims=True) - known) / jnp.maximum(count - 1, 1)
    differ = scored & _differ(rewards, scored)
    advantages = _known(known - others, differ)
    if normalise:
        mean, variance = _moments(advantages, scored & (count > 1))
        advantages = _known((advantages - mean) / (jnp.sqrt(variance) + EPSILON), differ)
    return advantages


def _known(x: Array, mask: Array) -> Array:
    return jnp.where(mask, x, 0.0).astype(jnp.float32)


def _next(x: Array) -> Array:
    """What stands one position to the right; zero behind the row."""
    return jnp.pad(x[:, 1:], ((0, 0), (0, 1)))


def _backwards(x: Array, mask: Array, decay: float) -> Array:
    """y_t = x_t + decay y_{t+1} where the mask is True, and 0 elsewhere."""

    def step(after, here):
        x, counts = here
        now = jnp.where(counts, x + decay * after, 0.0)
        return now, now

    return jax.lax.scan(step, jnp.zeros(x.shape[0]), (x.T, mask.T), reverse=True)[1].T


def _moments(x: Array, mask: Array, axis: int | None = None) -> tuple[Array, Array]:
    """Mean and unbiased variance of what counts, in float32; 0 of nothing, and the variance of one is 0."""
    count = mask.sum(axis=axis, keepdims=True)
    mean = _known(x, mask).sum(axis=axis, keepdims=True) / jnp.maximum(count, 1)
    squares = _known((_known(x, mask) - mean) ** 2, mask).sum(axis=axis, keepdims=True)
    return mean, squares / jnp.maximum(count - 1, 1)


def _differ(rewards: Array, scored: Array) -> Array:
    """Whether a group holds two rewards that differ; a mean is rounded, and would leave a trace of equal ones."""
    low = jnp.where(scored, rewards, jnp.inf).min(axis=1, keepdims=True)
    return low < jnp.where(scored, rewards, -jnp.inf).max(axis=1, keepdims=True)
