"""Preference without a reference: ORPO, SimPO, AlphaPO, CPO, and the likelihood of the chosen answer.

Two means of log-probabilities occur. A pair's a_c and a_r are over its own answers' tokens. The negative log-likelihood
is over all chosen tokens of the step, as in supervised training, and as a mean over pairs divides once by their number,
a pair's share is -lp_c / (mean number of chosen tokens a pair). Losses with this term are COUNTED: they take that mean
as `mean_count`, which whoever cuts a step into microbatches computes before.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxsft.losses.divergence import LARGEST
from jaxsft.losses.dpo import smoothed
from jaxsft.losses.scored import Losses, Scored, averages, existing, ratios, result

CERTAIN = -float(jnp.finfo(jnp.float32).eps)  # log of the largest probability below 1, whose odds are finite


def sft(pairs: Scored, *, beta: float = 0.1, mean_count: Float[Array, ""] | float | None = None) -> Losses:
    """-lp_c / mean_count: its mean over pairs is the negative log-likelihood a token of the chosen answers.

    On its own it is supervised fine-tuning; beside another loss it keeps the chosen answer likely (RPO, and pref_ftx of
    LLaMA-Factory, which takes the mean of each answer's own mean).

    Args:
      pairs: N of them; what a reference says only shows in the rewards.
      beta: of the rewards among the metrics.
      mean_count: chosen tokens a pair, over the step; by default over `pairs`.

    Example:
      >>> zeros, ones = jnp.zeros(2), jnp.ones(2)
      >>> pairs = Scored(-3 * ones, zeros, zeros, zeros, jnp.array([1.0, 5.0]), ones, ones > 0)
      >>> sft(pairs)[0].tolist()  # 6 nats for 6 tokens
      [1.0, 1.0]

    Source: Liu et al. 2024, arXiv:2405.16436, section 5; Pang et al. 2024, arXiv:2404.19733, equation 1. TRL divides by
    the tokens of each microbatch.
    """
    pairs = existing(pairs)
    chosen, rejected = ratios(pairs)
    return result(pairs, _nll(pairs, mean_count), (beta * chosen, beta * rejected))


def orpo(pairs: Scored, *, beta: float = 0.1, mean_count: Float[Array, ""] | float | None = None) -> Losses:
    """ORPO: -lp_c / mean_count + beta (-log sigmoid(log odds ratio)), with odds = p / (1 - p), p = exp(a).

        log odds ratio = (a_c - a_r) - (log(1 - exp a_c) - log(1 - exp a_r))

    Args:
      pairs: N of them; the reference is not looked at.
      beta: weight of the second term, lambda of the paper.
      mean_count: as in `sft`.

    Returns:
      (losses [N], metrics [N]): the rewards are beta a; with `nll`, whose mean is per token, and `log_odds`.

    Example:
      >>> zeros, ones = jnp.zeros(1), jnp.ones(1)
      >>> loss, metrics = orpo(Scored(-ones, -ones, zeros, zeros, ones, ones, ones > 0), beta=1.0)
      >>> round(float(loss[0]), 4), float(metrics["log_odds"][0])  # 1 + log 2
      (1.6931, 0.0)

    Source: Hong et al. 2024, arXiv:2403.07691, equations 4, 6 and 7. Here, as there, the likelihood is the answer's;
    TRL's is that of prompt and answer, over the tokens of a microbatch. LLaMA-Factory takes a_c, the mean of means.
    """
    pairs = existing(pairs)
    chosen, rejected = averages(pairs)
    # Of a probability of 1 the odds are infinite, and the gradient of their logarithm is no number.
    rest = lambda a: jax.nn.log1mexp(-jnp.minimum(a, CERTAIN))
    log_odds = (chosen - rejected) - (rest(chosen) - rest(rejected))
    nll = _nll(pairs, mean_count)
    loss = nll - beta * jax.nn.log_sigmoid(log_odds)
    return result(pairs, loss, (beta * chosen, beta * rejected), nll=nll, log_odds=log_odds)


def simpo(pairs: Scored, *, beta: float = 0.1, gamma: float = 0.5, label_smoothing: float = 0.0) -> Losses:
    """SimPO: -log sigmoid(beta (a_c - a_r) - gamma), with smoothing as in `sigmoid`.

    Args:
      pairs: N of them; the reference is not looked at.
      beta: what a nat of the mean log-probability is worth: 2 to 2.5 in the paper; the default is TRL's.
      gamma: how far apart two answers are to be (TRL: simpo_gamma).
      label_smoothing: eps.

    Returns:
      (losses [N], metrics [N]): the rewards are beta a.

    Example:
      >>> zeros, ones = jnp.zeros(1), jnp.ones(1)
      >>> loss, _ = simpo(Scored(-ones, -2 * ones, zeros, zeros, ones, ones, ones > 0), beta=2.0, gamma=2.0)
      >>> round(float(loss[0]), 4)
      0.6931

    Source: Meng et al. 2024, arXiv:2405.14734, equation 6. TRL's CPOTrainer adds the likelihood of the chosen answer
    unless cpo_alpha is 0: that is {"simpo": 1, "sft": cpo_alpha} here.
    """
    pairs = existing(pairs)
    chosen, rejected = (beta * a for a in averages(pairs))
    return result(pairs, smoothed(chosen - rejected - gamma, label_smoothing), (chosen, rejected))


def alphapo(
    pairs: Scored, *, beta: float = 0.1, gamma: float = 0.5, alpha: float = 0.25, label_smoothing: float = 0.0
) -> Losses:
    """AlphaPO: SimPO with another shape of reward, beta (1 - exp(-alpha a)) / alpha in place of beta a.

    With alpha above 0 an unlikely answer counts for more, with alpha below 0 a likely one; at 0 it is `simpo`.

    Args:
      pairs, beta, gamma, label_smoothing: as in `simpo`.
      alpha: the shape; the paper's 0.25.

    Example:
      >>> zeros, ones = jnp.zeros(1), jnp.ones(1)
      >>> pairs = Scored(-ones, -2 * ones, zeros, zeros, ones, ones, ones > 0)
      >>> [round(float(alphapo(pairs, beta=1.0, gamma=0.0, alpha=a)[0][0]), 4) for a in (0.0, 0.5)]
      [0.3133, 0.1113]

    Source: Gupta et al. 2025, arXiv:2501.03884; alpha from table 3. TRL: CPOTrainer's alphapo.
    """
    if abs(alpha) < 1e-6:
        return simpo(pairs, beta=beta, gamma=gamma, label_smoothing=label_smoothing)
    pairs = existing(pairs)
    chosen, rejected = (-beta * jnp.expm1(jnp.minimum(-alpha * a, LARGEST)) / alpha for a in averages(pairs))
    return result(pairs, smoothed(chosen - rejected - gamma, label_smoothing), (chosen, rejected))


def cpo(
    pairs: Scored,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    cpo_alpha: float = 1.0,
    mean_count: Float[Array, ""] | float | None = None,
) -> Losses:
    """CPO: -log sigmoid(beta (lp_c - lp_r)) + cpo_alpha (-lp_c / mean_count), with smoothing as in `sigmoid`.

    Args:
      pairs: N of them; the reference is not looked at.
      beta: as in `sigmoid`.
      label_smoothing: eps, of the first term.
      cpo_alpha: weight of the second.
      mean_count: as in `sft`.

    Returns:
      (losses [N], metrics [N]): the rewards are beta lp; with `nll`, whose mean is per token.

    Example:
      >>> zeros, ones = jnp.zeros(1), jnp.ones(1)
      >>> loss, metrics = cpo(Scored(-ones, -ones, zeros, zeros, ones, ones, ones > 0))
      >>> round(float(loss[0]), 4), float(metrics["nll"][0])
      (1.6931, 1.0)

    Source: Xu et al. 2024, arXiv:2401.08417, section 3. TRL's mean is over the tokens of a microbatch.
    """
    pairs = existing(pairs)
    gap, nll = beta * (pairs.chosen - pairs.rejected), _nll(pairs, mean_count)
    loss = smoothed(gap, label_smoothing) + cpo_alpha * nll
    return result(pairs, loss, (beta * pairs.chosen, beta * pairs.rejected), nll=nll)


def _nll(pairs, mean_count):
    if mean_count is None:
        known = lambda x: jnp.where(pairs.exists, x, 0.0).sum()
        mean_count = known(pairs.chosen_count) / jnp.maximum(known(1.0), 1.0)
    return -pairs.chosen / jnp.maximum(mean_count, 1.0)
