"""PPO: a critic expects a reward, and the policy moves to what was better than expected, a little at a time.

Source: Schulman et al. 2017, arXiv:1707.06347; for language models Ziegler et al. 2019, arXiv:1909.08593, and Ouyang et
al. 2022, arXiv:2203.02155.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxsft import losses
from jaxsft.losses import Chunk
from jaxsft.models import Model
from jaxsft.objectives.episodes import Assessed, Judged, assess, mean, rewarded, spread
from jaxsft.types import Rollouts, Tokens


@dataclass(frozen=True)
class PPO:
    """How the policy and its critic learn."""

    kl_coef: float = 0.05
    """how much of a reward each nat of divergence from the reference costs"""
    kl_estimator: Literal["k1", "k3"] = "k1"
    """of the divergence at a token: k1, log policy / reference; k3, never negative, of less variance"""
    kl_target: float | None = None
    """nats an answer; kl_coef then rises and falls to keep the divergence there"""
    kl_horizon: int = 10_000
    """episodes in which kl_coef adapts"""
    kl_stop: float | None = None
    """nats a token that the policy may drift from the one that drew, before the rest of an iteration is left out"""
    gamma: float = 1.0
    """discount of later rewards"""
    lam: float = 0.95
    """of generalised advantage estimation: 0 trusts the critic, 1 what came"""
    clip: float = 0.2
    """how far the ratio of new to old probability counts, 1 - clip to 1 + clip"""
    clip_high: float | None = None
    """another bound above"""
    value_clip: float | None = 0.2
    """how far a value may move in one iteration; null for any"""
    value_coef: float = 0.1
    """weight of the critic's loss"""
    entropy_coef: float = 0.0
    """weight of the entropy, which keeps answers varied"""
    whiten_advantages: bool = True
    """mean 0 and variance 1 over the tokens of an iteration"""
    whiten_rewards: bool = False
    """variance 1 of the rewards of an iteration, before the advantages"""
    missing_eos_penalty: float | None = None
    """taken off the reward of an answer that no stop token or string ended"""
    critic: Literal["own", "shared"] = "own"
    """own: an adapter (or copy of what trains) and a score of its own; shared: a score on the policy's features"""


def scoring(
    model: Model,
    *,
    kl_estimator: str = "k1",
    gamma: float = 1.0,
    lam: float = 0.95,
    whiten_advantages: bool = True,
    whiten_rewards: bool = False,
    temperature: float = 1.0,
    judge: Model | None = None,
    judge_weight: float = 0.0,
    pieces: int = 1,
    chunk: Chunk | None = None,
):
    """Makes the function that turns episodes and their rewards into `Rollouts`.

    An episode's reward comes at its last token, the token that ended it included; each token costs `kl_coef` times its
    divergence from the reference. Advantages are those of `losses.gae`.

    Args:
      model: the policy's.
      kl_estimator, gamma, lam, whiten_advantages, whiten_rewards: see `PPO`.
      temperature: that the answers were drawn at.
      judge, judge_weight: a reward model, and what its score counts.
      pieces, chunk: see `assess`.

    Returns:
      (variables, tokens, episode, given, silent, kl_coef) -> Judged, to be compiled: packed episodes and their numbers,
      the rewards [N] that functions gave, and which [N] are not learned from. Metrics: kl (a token) and kl_answer,
      explained_variance of the critic, value, return.
    """

    def score(
        variables: Mapping,
        tokens: Tokens,
        episode: Int[Array, "B T"],
        given: Float[Array, "N"],
        silent: Bool[Array, "N"],
        kl_coef: Float[Array, ""],
    ) -> Judged:
        how = {"temperature": temperature, "reference": True, "judge": judge, "pieces": pieces, "chunk": chunk}
        found = assess(model, variables, tokens, **how)
        rewards = rewarded(found, episode, given, judge_weight)
        tokens = heard(tokens, episode, silent)
        learned = losses.shift(tokens.tokens, tokens.mask, tokens.segments)[1]
        divergence = losses.kl(found.old, found.reference, learned, estimator=kl_estimator)
        paid = jnp.where(losses.last(learned), spread(rewards, episode), 0.0) - kl_coef * divergence
        paid = losses.whiten(paid, learned, keep_mean=True) if whiten_rewards else paid
        advantage, returns = losses.gae(paid, found.value, learned, gamma=gamma, lam=lam)
        advantage = losses.whiten(advantage, learned) if whiten_advantages else advantage
        explained, total = losses.explained_variance(found.value, returns, learned)
        metrics = told(found, learned, kl_estimator, judge is not None) | {
            "value": mean(found.value, learned),
            "return": mean(returns, learned),
            "explained_variance": explained / jnp.maximum(total, 1e-8),
        }
        return Judged(rollouts(tokens, found, advantage, returns), rewards, metrics)

    return score


def heard(tokens: Tokens, episode: Int[Array, "B T"], silent: Bool[Array, "N"]) -> Tokens:
    """The episodes that are learned from; of the others no token is."""
    return tokens._replace(mask=tokens.mask & ~jnp.append(silent, True)[episode])


def told(
    found: Assessed, learned: Bool[Array, "B T"], estimator: str | None, judged: bool
) -> dict[str, Float[Array, ""]]:
    """The divergence from the reference, a token and an answer, and what the reward model says, if they were asked."""
    ends = losses.last(learned)
    score = {"reward_model": mean(found.score, ends)} if judged else {}
    if estimator is None:
        return score
    divergence = losses.kl(found.old, found.reference, learned, estimator=estimator)
    return {"kl": mean(divergence, learned), "kl_answer": divergence.sum() / jnp.maximum(ends.sum(), 1)} | score


def rollouts(tokens: Tokens, found: Assessed, advantage: Float[Array, "B T"], returns: Float[Array, "B T"]) -> Rollouts:
    """Puts together what an update needs."""
    fresh = jnp.zeros((len(tokens.tokens), 1), bool)
    return Rollouts(*tokens, found.old, found.reference, advantage, found.value, returns, fresh)
