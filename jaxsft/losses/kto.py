"""Unpaired preference: answers that are wanted or not, one by one. KTO, the unpaired APO-zero, and BCO.

Each loss looks at an answer's reward, beta log policy / reference, from a point of reference: KTO's is an estimate of
the KL divergence of policy and reference, BCO's the mean reward, APO's is 0. The first two belong to the whole step and
have no gradient; `kto_kl` and `bco_shift` make them, before a step is cut into microbatches.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxsft.losses.scored import Losses


class ScoredAnswers(NamedTuple):
    """Log-probabilities of N answers, each summed over its tokens, float32 in nats."""

    answer: Float[Array, "N"]
    ref_answer: Float[Array, "N"]  # of the reference
    label: Bool[Array, "N"]  # is it wanted?
    exists: Bool[Array, "N"]  # False: only fills up the batch, and has no loss, no metrics, no gradient


def kto(
    answers: ScoredAnswers,
    *,
    kl: Float[Array, ""] | float,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Losses:
    """KTO: w_d (1 - sigmoid(r - beta kl)) of wanted answers, w_u (1 - sigmoid(beta kl - r)) of others.

    Args:
      answers: N of them.
      kl: from `kto_kl`, of the step.
      beta: how soon a gain or a loss is felt as enough.
      desirable_weight: w_d; with the other, makes up for data of which most is wanted, or is not.
      undesirable_weight: w_u.

    Returns:
      (losses [N], metrics [N]): `reward`; `reward_desirable`, 0 where the label is False, and `reward_undesirable`, 0
      where it is True: sums to be divided by the number of either.

    Example:
      >>> zeros, label = jnp.zeros(2), jnp.array([True, False])
      >>> loss, _ = kto(ScoredAnswers(zeros, zeros, label, label | True), kl=0.0, undesirable_weight=2.0)
      >>> loss.tolist()
      [0.5, 1.0]

    Source: Ethayarajh et al. 2024, arXiv:2402.01306, equation 7, and 8 for the weights.
    """
    reward = _reward(answers, beta)
    gain = jnp.where(answers.label, reward - beta * kl, beta * kl - reward)
    weight = jnp.where(answers.label, desirable_weight, undesirable_weight)
    return _result(answers, weight * jax.nn.sigmoid(-gain), reward)


def kto_kl(policy: Float[Array, "N"], reference: Float[Array, "N"], exists: Bool[Array, "N"]) -> Float[Array, ""]:
    """max(0, mean(log policy / reference)) over answers that belong to other prompts, without gradient.

    Args:
      policy: log-probabilities of mismatched answers, each to the prompt of another row: all of the step.
      reference: the reference's.
      exists: which of them exist.

    Example:
      >>> kto_kl(jnp.array([-1.0, -2.0, 9.0]), jnp.array([-3.0, -3.0, 0.0]), jnp.array([True, True, False])).item()
      1.5

    Source: Ethayarajh et al. 2024, arXiv:2402.01306, section 4.1. TRL's is over one microbatch, on all devices.
    """
    ratio = jnp.where(exists, policy - reference, 0.0)
    return jax.lax.stop_gradient(jnp.maximum(_mean(ratio, exists), 0.0))


def apo_zero_unpaired(
    answers: ScoredAnswers, *, beta: float = 0.1, desirable_weight: float = 1.0, undesirable_weight: float = 1.0
) -> Losses:
    """APO-zero of single answers: w_d (1 - sigmoid(r)) of wanted ones, w_u sigmoid(r) of others: `kto` with kl 0.

    Example:
      >>> zeros, label = jnp.zeros(2), jnp.array([True, False])
      >>> apo_zero_unpaired(ScoredAnswers(zeros, zeros, label, label | True))[0].tolist()
      [0.5, 0.5]

    Source: D'Oosterlinck et al. 2024, arXiv:2408.06266, equation 7, unpaired as in TRL.
    """
    weights = {"desirable_weight": desirable_weight, "undesirable_weight": undesirable_weight}
    return kto(answers, kl=0.0, beta=beta, **weights)


def bco(answers: ScoredAnswers, *, delta: Float[Array, ""] | float, beta: float = 0.1) -> Losses:
    """BCO: -log sigmoid(r - delta) of wanted answers, -log sigmoid(delta - r) of others.

    Args:
      answers: N of them.
      delta: from `bco_shift`, of the step.
      beta: as in `kto`.

    Returns:
      (losses [N], metrics [N]): as `kto`.

    Example:
      >>> ratio, label = jnp.array([1.0, 1.0]), jnp.array([True, False])
      >>> answers = ScoredAnswers(ratio, 0 * ratio, label, label | True)
      >>> [round(x, 4) for x in bco(answers, delta=bco_shift(answers, beta=0.1), beta=0.1)[0].tolist()]
      [0.6931, 0.6931]

    Source: Jung et al. 2024, arXiv:2404.04656, section 4; its weights for prompts that differ by label are left out.
    """
    reward = _reward(answers, beta)
    gap = jnp.where(answers.label, reward - delta, delta - reward)
    return _result(answers, -jax.nn.log_sigmoid(gap), reward)


def bco_shift(answers: ScoredAnswers, beta: float = 0.1) -> Float[Array, ""]:
    """The mean reward of the step's answers, without gradient.

    TRL (1.10; 1.16 has no BCO) and LLaMA-Factory keep a mean over all steps so far, which this equals at the first.
    Here a step means the same whenever it comes, and nothing but the model is to be saved for a run to resume bit by
    bit.

    Example:
      >>> ratio, label = jnp.array([10.0, 30.0]), jnp.array([True, False])
      >>> bco_shift(ScoredAnswers(ratio, 0 * ratio, label, label | True), beta=0.1).item()
      2.0
    """
    return jax.lax.stop_gradient(_mean(_reward(answers, beta), answers.exists))


class Unpaired(NamedTuple):
    """A loss of single answers in two parts, since what all answers of a step share is found before it is cut."""

    point: Callable[..., dict[str, Array]] | None  # (answers, policy, reference) -> what `loss` takes beside answers
    loss: Callable[..., Losses]  # (answers, **point)


def unpaired(name: str, **options: Any) -> Unpaired:
    """A loss of UNPAIRED with its options, and the point of reference that it looks at rewards from.

    Args:
      name: of the loss.
      options: beta, desirable_weight, ..., of the loss.

    Raises:
      ValueError: no such loss; an option that it does not take.

    Example:
      >>> zeros, exists = jnp.zeros(2), jnp.ones(2, bool)
      >>> unpaired("kto", beta=0.2).point(ScoredAnswers(zeros, zeros, exists, exists), zeros + 3, zeros)["kl"].item()
      3.0
    """
    if name not in UNPAIRED:
        raise ValueError(f"there is no loss of single answers {name!r}; there are {', '.join(UNPAIRED)}")
    taken = set(inspect.signature(UNPAIRED[name]).parameters) - {"answers", "kl", "delta"}
    if stray := sorted(set(options) - taken):
        raise ValueError(f"{name} takes no {', '.join(stray)}; there are {', '.join(sorted(taken))}")
    beta = {"beta": options["beta"]} if "beta" in options else {}
    points = {
        "kto": lambda answers, policy, reference: {"kl": kto_kl(policy, reference, answers.exists)},
        "apo_zero_unpaired": None,
        "bco": lambda answers, policy, reference: {"delta": bco_shift(answers, **beta)},
    }
    return Unpaired(points[name], functools.partial(UNPAIRED[name], **options))


UNPAIRED: dict[str, Callable[..., Losses]] = {"kto": kto, "apo_zero_unpaired": apo_zero_unpaired, "bco": bco}


def _reward(answers, beta):
    return beta * jnp.where(answers.exists, answers.answer - answers.ref_answer, 0.0)


def _mean(values, exists):
    return values.sum() / jnp.maximum(exists.sum(), 1)


def _result(answers, loss, reward):
    wanted = lambda label: jnp.where(answers.label == label, reward, 0.0)
    metrics = {"reward": reward, "reward_desirable": wanted(True), "reward_undesirable": wanted(False)}
    return jnp.where(answers.exists, loss, 0.0), metrics
