"""KL divergence of policy and reference from the sampled tokens alone, and how strongly it is to count.

With u = log reference - log policy of a token that the policy drew, each of the three has, or nearly has, the
divergence KL(policy, reference) as its mean:

    k1 = -u                    unbiased; of a single token often below 0
    k2 = u^2 / 2               a little biased, never below 0; its gradient is an unbiased one of the divergence
    k3 = exp(u) - u - 1        unbiased, never below 0, and of less variance

Source: Schulman 2020, "Approximating KL divergence", http://joschu.net/blog/kl-approx.html.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxsft.losses.divergence import LARGEST

ESTIMATORS = ("k1", "k2", "k3")


def kl(
    logprobs: Float[Array, "*N"],
    reference: Float[Array, "*N"],
    mask: Bool[Array, "*N"],
    *,
    estimator: str = "k3",
) -> Float[Array, "*N"]:
    """The estimate of each token, float32 in nats; 0 where the mask is False, whatever stands there.

    As a part of a reward (PPO, RLOO, REINFORCE++) it is k1 of the policy that drew the tokens, summed over an episode.
    As a term beside the loss (GRPO) it is k3 of the policy that learns; times `ratio` it is corrected for tokens that
    an older policy drew (DeepSeek-V3.2, TRL: use_bias_correction_kl).

    Args:
      logprobs: log-probabilities of tokens under the policy.
      reference: under the reference.
      mask: which count.
      estimator: one of ESTIMATORS. The u of k3 is at most 80, where float32 still holds its exponential; a token which
        the reference finds e^80 times as likely has no gradient. (TRL is infinite from e^88 on.)

    Raises:
      ValueError: there is no such estimator.

    Example:
      >>> policy, reference = jnp.log(jnp.array([0.5])), jnp.log(jnp.array([0.25]))
      >>> [round(float(kl(policy, reference, policy < 0, estimator=name)[0]), 3) for name in ESTIMATORS]
      [0.693, 0.24, 0.193]
    """
    apart = jnp.where(mask, reference - logprobs, 0.0).astype(jnp.float32)
    if estimator == "k1":
        return -apart
    if estimator == "k2":
        return apart**2 / 2
    if estimator == "k3":
        apart = jnp.minimum(apart, LARGEST)
        return jnp.expm1(apart) - apart
    raise ValueError(f"estimator is {estimator}; it must be one of {', '.join(ESTIMATORS)}")


def adapt(
    coefficient: Float[Array, ""] | float,
    kl: Float[Array, ""] | float,
    *,
    target: float,
    horizon: float,
    steps: float,
) -> Float[Array, ""]:
    """The coefficient of the next rollout: larger if the policy went farther than `target`, smaller if not so far.

        e = clip(kl / target - 1, -0.2, 0.2)        coefficient (1 + e steps / horizon)

    Args:
      coefficient: that the rollout was rewarded with.
      kl: the rollout's divergence an episode: the mean over episodes of the sum over tokens.
      target: what it should be.
      horizon: in how many episodes a coefficient that is wrong for good changes by a fifth.
      steps: episodes of the rollout.

    Example:
      >>> float(adapt(0.5, 60.0, target=6.0, horizon=100, steps=50))
      0.550000011920929

    Source: Ziegler et al. 2019, arXiv:1909.08593, section 2.2, whose K of 0.1 is steps / horizon here, as in its code
    and TRL's AdaptiveKLController.
    """
    error = jnp.clip(kl / target - 1, -0.2, 0.2)
    return jnp.asarray(coefficient * (1 + error * steps / horizon), jnp.float32)
