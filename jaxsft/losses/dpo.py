"""DPO and its kin: losses of the difference of two rewards, each beta log policy / reference.

    delta = score(log-ratio of chosen) - score(log-ratio of rejected)       score: the identity, or see divergence.py

They differ in how much they mind a pair that is already well apart, or one whose label may be wrong. All take
`divergence` and its `alpha`. Nothing but the difference counts: both answers may become less likely together, which
the losses of absolute.py look at, and a term `sft` beside the loss prevents.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxsft.losses.divergence import LARGEST, score
from jaxsft.losses.scored import Losses, Scored, existing, ratios, result


def sigmoid(
    pairs: Scored,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    divergence: str = "reverse_kl",
    alpha: float = 0.5,
) -> Losses:
    """DPO: -log sigmoid(beta delta); with smoothing, conservative DPO.

        (1 - eps) (-log sigmoid(beta delta)) + eps (-log sigmoid(-beta delta))

    Args:
      pairs: N of them.
      beta: what a nat of log-ratio is worth; the larger, the nearer to its reference the policy stays.
      label_smoothing: eps, the share of pairs whose order is taken to be wrong.
      divergence: see divergence.py.
      alpha: of `alpha_divergence`.

    Returns:
      (losses [N], metrics [N]): rewards_chosen and rewards_rejected are beta log policy / reference.

    Example:
      >>> zeros, ones = jnp.zeros(1), jnp.ones(1)
      >>> loss, metrics = sigmoid(Scored(zeros, zeros, zeros, zeros, ones, ones, ones > 0))
      >>> round(float(loss[0]), 4)  # log 2, where policy and reference agree
      0.6931

    Source: Rafailov et al. 2023, arXiv:2305.18290, equation 7; smoothing: Mitchell 2023, "A note on DPO with noisy
    preferences", equation 3. TRL's `sigmoid` ignores label_smoothing, which OpenRLHF and LLaMA-Factory heed.
    """
    pairs = existing(pairs)
    return result(pairs, smoothed(beta * _delta(pairs, divergence, alpha), label_smoothing), _rewards(pairs, beta))


def sigmoid_norm(pairs: Scored, *, beta: float = 0.1, divergence: str = "reverse_kl", alpha: float = 0.5) -> Losses:
    """Length-normalised DPO: -log sigmoid(beta (c / n_c - r / n_r)), with scores c, r and n tokens an answer.

    A score is then worth a token's, so beta is to be larger than for `sigmoid`. Without a reference it is `simpo`.

    Example:
      >>> one, two = jnp.ones(1), jnp.full(1, 2.0)
      >>> loss, _ = sigmoid_norm(Scored(two, one, 0 * one, 0 * one, two, one, one > 0))
      >>> round(float(loss[0]), 4)  # a token of either is as likely
      0.6931

    Source: Lambert et al. 2024, "Tulu 3", arXiv:2411.15124, section 5 (with beta 5).
    """
    pairs = existing(pairs)
    loss = -jax.nn.log_sigmoid(beta * _delta_a_token(pairs, divergence, alpha))
    return result(pairs, loss, _rewards(pairs, beta))


def hinge(pairs: Scored, *, beta: float = 0.1, divergence: str = "reverse_kl", alpha: float = 0.5) -> Losses:
    """SLiC and RSO: max(0, 1 - beta delta). Pairs that are apart by 1 / beta do not train.

    With a reference of zeros this is SLiC-HF, and what TRL's CPOTrainer calls hinge.

    Example:
      >>> zeros, ones = jnp.zeros(1), jnp.ones(1)
      >>> hinge(Scored(5 * ones, zeros, zeros, zeros, ones, ones, ones > 0))[0].tolist()
      [0.5]

    Source: Zhao et al. 2023, arXiv:2305.10425, section 2; with the reference: Liu et al. 2023, arXiv:2309.06657,
    "hinge-norm".
    """
    pairs = existing(pairs)
    return result(pairs, jax.nn.relu(1 - beta * _delta(pairs, divergence, alpha)), _rewards(pairs, beta))


def ipo(pairs: Scored, *, beta: float = 0.1, divergence: str = "reverse_kl", alpha: float = 0.5) -> Losses:
    """IPO: (c / n_c - r / n_r - 1 / (2 beta))^2, with scores c, r and n tokens an answer. beta is the paper's tau.

    The square keeps pairs from drifting apart for ever, which the sigmoid does if labels never contradict each other.
    As TRL and LLaMA-Factory, and as the paper's authors confirmed to TRL, scores are means over the answer's tokens;
    the paper does not say so, and OpenRLHF takes sums. With a reference of zeros it is the ipo of TRL's CPOTrainer.

    Example:
      >>> zeros, ones = jnp.zeros(1), jnp.ones(1)
      >>> ipo(Scored(ones, zeros, zeros, zeros, ones, ones, ones > 0), beta=0.5)[0].tolist()
      [0.0]

    Source: Azar et al. 2023, arXiv:2310.12036, equation 17.
    """
    pairs = existing(pairs)
    loss = (_delta_a_token(pairs, divergence, alpha) - 1 / (2 * beta)) ** 2
    return result(pairs, loss, _rewards(pairs, beta))


def robust(
    pairs: Scored,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    divergence: str = "reverse_kl",
    alpha: float = 0.5,
) -> Losses:
    """Robust DPO: [(1 - eps) (-log sigmoid(beta delta)) - eps (-log sigmoid(-beta delta))] / (1 - 2 eps).

    Its mean over labels of which a share eps is flipped at random is DPO's over the true ones. It has no lower bound.

    Raises:
      ValueError: `label_smoothing` is not in [0, 0.5): labels of which half are wrong say nothing.

    Example:
      >>> zeros, ones = jnp.zeros(1), jnp.ones(1)
      >>> loss, _ = robust(Scored(ones, zeros, zeros, zeros, ones, ones, ones > 0), beta=1.0, label_smoothing=0.1)
      >>> round(float(loss[0]), 4)
      0.1883

    Source: Chowdhury et al. 2024, arXiv:2403.00409, section 3.1. TRL only warns of a wrong eps.
    """
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(
            f"label_smoothing is {label_smoothing}; robust takes the probability that a label is flipped, which must "
            "be at least 0 and below 0.5 (the paper has 0.1)"
        )
    pairs = existing(pairs)
    gap = beta * _delta(pairs, divergence, alpha)
    true, flipped = -jax.nn.log_sigmoid(gap), -jax.nn.log_sigmoid(-gap)
    loss = ((1 - label_smoothing) * true - label_smoothing * flipped) / (1 - 2 * label_smoothing)
    return result(pairs, loss, _rewards(pairs, beta))


def exo_pair(
    pairs: Scored,
    *,
    beta: float = 0.1,
    label_smoothing: float = 1e-3,
    divergence: str = "reverse_kl",
    alpha: float = 0.5,
) -> Losses:
    """EXO: reverse KL between q = sigmoid(beta delta), the policy's choice, and 1 - eps, the label's.

        q (log q - log(1 - eps)) + (1 - q) (log(1 - q) - log eps)

    Raises:
      ValueError: `label_smoothing` is not in (0, 1): the label must leave some probability to the other answer.

    Example:
      >>> zeros, ones = jnp.zeros(1), jnp.ones(1)
      >>> loss, _ = exo_pair(Scored(zeros, zeros, zeros, zeros, ones, ones, ones > 0), label_smoothing=0.5)
      >>> round(abs(float(loss[0])), 4)
      0.0

    Source: Ji et al. 2024, arXiv:2402.00856, equation 16; the paper has eps = 1e-3, TRL has no default.
    """
    if not 0 < label_smoothing < 1:
        raise ValueError(
            f"label_smoothing is {label_smoothing}; exo_pair takes the logarithm of it, so it must be above 0 and "
            "below 1 (the paper has 1e-3)"
        )
    pairs = existing(pairs)
    gap = beta * _delta(pairs, divergence, alpha)
    label, other = jnp.log1p(-label_smoothing), jnp.log(label_smoothing)
    loss = jax.nn.sigmoid(gap) * (jax.nn.log_sigmoid(gap) - label)
    loss += jax.nn.sigmoid(-gap) * (jax.nn.log_sigmoid(-gap) - other)
    return result(pairs, loss, _rewards(pairs, beta))


def discopop(
    pairs: Scored, *, beta: float = 0.1, tau: float = 0.05, divergence: str = "reverse_kl", alpha: float = 0.5
) -> Losses:
    """DiscoPOP, a loss that a language model found: logistic and exponential, mixed by how far apart a pair is.

        (1 - m) (-log sigmoid(x)) + m exp(-x),  with x = beta delta, m = sigmoid(x / tau)

    It is not convex: with a tau below 0.1 it rises around x = 0, so that a policy that starts as its reference is first
    pushed the wrong way, to a local minimum.

    Args:
      pairs: N of them.
      beta: as in `sigmoid`.
      tau: the width of the change from one to the other.
      divergence, alpha: as in `sigmoid`.

    Example:
      >>> zeros, ones = jnp.zeros(1), jnp.ones(1)
      >>> loss, _ = discopop(Scored(zeros, zeros, zeros, zeros, ones, ones, ones > 0))
      >>> round(float(loss[0]), 4)  # (log 2 + 1) / 2
      0.8466

    Source: Lu et al. 2024, arXiv:2406.08414, equation 5. Here m exp(-x) is one exponential; TRL multiplies 0 by
    infinity, and has NaN, at beta delta < -88.
    """
    pairs = existing(pairs)
    gap = beta * _delta(pairs, divergence, alpha)
    exponential = jnp.exp(jnp.minimum(jax.nn.log_sigmoid(gap / tau) - gap, LARGEST))
    loss = jax.nn.sigmoid(-gap / tau) * -jax.nn.log_sigmoid(gap) + exponential
    return result(pairs, loss, _rewards(pairs, beta))


def smoothed(gap: Float[Array, "N"], eps: float) -> Float[Array, "N"]:
    """-log sigmoid(gap) of labels of which a share eps is wrong."""
    return (1 - eps) * -jax.nn.log_sigmoid(gap) + eps * -jax.nn.log_sigmoid(-gap)


def _rewards(pairs, beta):
    chosen, rejected = ratios(pairs)
    return beta * chosen, beta * rejected


def _delta(pairs, divergence, alpha):
    chosen, rejected = (score(ratio, divergence, alpha) for ratio in ratios(pairs))
    return chosen - rejected


def _delta_a_token(pairs, divergence, alpha):
    chosen, rejected = (score(ratio, divergence, alpha) for ratio in ratios(pairs))
    return chosen / pairs.chosen_count - rejected / pairs.rejected_count
