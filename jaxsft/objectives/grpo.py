"""GRPO and its kin: several answers to each prompt, compared with one another instead of with a critic's expectation.

| method | advantage | loss | mean over |
|---|---|---|---|
| grpo | (reward - group's mean) / group's deviation | clipped | episodes of tokens |
| dr_grpo | reward - group's mean | clipped | a fixed number of tokens |
| dapo, bnpo | as grpo | clipped | tokens |
| cispo | as grpo | clipped weights | tokens |
| gspo | as grpo | clipped, of whole answers | episodes |
| rloo | reward - mean of the group's others, less divergence | clipped | episodes |
| reinforce++ | whitened reward to go, less divergence | clipped | tokens |
| reinforce++_baseline | likewise, of reward - group's mean | clipped | tokens |
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxsft import losses
from jaxsft.losses import Chunk
from jaxsft.models import Model
from jaxsft.objectives.episodes import Judged, assess, each, rewarded, spread
from jaxsft.objectives.ppo import heard, rollouts, told
from jaxsft.types import Tokens

Scale = Literal["group", "batch", "none"]


class Method(NamedTuple):
    """How a method compares answers; its loss and what that is a mean over are `losses.LOSS_TYPES`."""

    loss_type: str
    advantage: Literal["group", "leave_one_out", "reward_to_go", "group_reward_to_go"] = "group"
    scale: Scale = "group"  # of advantages of a group
    charges: bool = False  # is the divergence taken off the reward, instead of being a loss?


METHODS = {
    "grpo": Method("grpo"),
    "dr_grpo": Method("dr_grpo", scale="none"),
    "dapo": Method("dapo"),
    "bnpo": Method("bnpo"),
    "cispo": Method("cispo"),
    "gspo": Method("gspo"),
    "rloo": Method("rloo", "leave_one_out", charges=True),
    "reinforce++": Method("reinforce++", "reward_to_go", charges=True),
    "reinforce++_baseline": Method("reinforce++", "group_reward_to_go", charges=True),
}


@dataclass(frozen=True)
class GRPO:
    """How the answers of a group are compared, and how the policy learns from that."""

    method: str = "grpo"
    """grpo, dr_grpo, dapo, bnpo, cispo, gspo, rloo, reinforce++, reinforce++_baseline"""
    kl_coef: float = 0.0
    """of the divergence from the reference: k3 in the loss, or for rloo and reinforce++ k1 off the reward; 0 needs no
    reference"""
    clip: float | None = None
    """how far the ratio of new to old probability may fall below 1; by default 0.2, and 3e-4 of gspo's whole answers"""
    clip_high: float | None = None
    """how far it may rise above 1; by default as far as it may fall, 4e-4 for gspo; dapo's paper has 0.28"""
    cap: float = 5.0
    """cispo: the most that a token weighs"""
    delta: float | None = None
    """a bound above for answers that are worse than the others"""
    scale: Literal["group", "batch", "none"] | None = None
    """what advantages are divided by: the deviation of the group or of all answers, or nothing; by default the
    method's own"""
    entropy_coef: float = 0.0
    """weight of the entropy, which keeps answers varied"""
    mask_truncated: bool = False
    """do not learn from answers that no stop token or string ended"""
    missing_eos_penalty: float | None = None
    """taken off the reward of such answers"""
    kl_stop: float | None = None
    """nats a token that the policy may drift from the one that drew, before the rest of an iteration is left out"""


def learning(config: GRPO, *, max_new_tokens: int, temperature: float = 1.0) -> dict[str, Any]:
    """What `policy` is told of a configuration.

    Raises:
      ValueError: an unknown method; a bound that it does not have.

    Example:
      >>> learning(GRPO(method="dr_grpo", clip=0.1), max_new_tokens=64)["bounds"]
      {'low': 0.1, 'high': 0.1}
    """
    c, made = config, find(config.method)
    loss, aggregate = losses.LOSS_TYPES[made.loss_type]
    high = c.clip if c.clip_high is None else c.clip_high
    bounds = {"cap": c.cap} if loss == "cispo" else {"low": c.clip, "high": high, "delta": c.delta}
    if loss == "cispo" and (c.clip, c.clip_high, c.delta) != (None, None, None):
        raise ValueError("grpo.method cispo has one bound, grpo.cap; leave clip, clip_high and delta out")
    return {
        "loss": loss,
        "bounds": {name: value for name, value in bounds.items() if value is not None},
        "aggregate": aggregate,
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "kl_coef": 0.0 if made.charges else c.kl_coef,
        "entropy_coef": c.entropy_coef,
    }


def scoring(
    model: Model,
    *,
    method: str = "grpo",
    scale: Scale | None = None,
    samples: int,
    reference: bool = False,
    old: bool = True,
    temperature: float = 1.0,
    judge: Model | None = None,
    judge_weight: float = 0.0,
    pieces: int = 1,
    chunk: Chunk | None = None,
):
    """Makes the function that turns groups of episodes and their rewards into `Rollouts`.

    Args:
      model: the policy's.
      method, scale: see `GRPO`.
      samples: answers to each prompt; those of one prompt stand beside each other.
      reference: does it run? The divergence then is known, and charged by the methods that charge it.
      old: is the policy asked, too? Not needed without reference where one step learns from all answers.
      temperature, judge, judge_weight, pieces, chunk: see `ppo.scoring`.

    Returns:
      (variables, tokens, episode, given, silent, kl_coef) -> Judged, as `ppo.scoring` does; an answer without a reward
      (NaN) takes no part in its group. Metrics: kl and kl_answer where the reference runs; reward_deviation, the mean
      over groups; alike, the share of groups whose answers all have one reward, and teach nothing.

    Raises:
      ValueError: an unknown method, or too few answers to compare.
    """
    made = find(method)
    if made.advantage != "reward_to_go" and samples < 2:
        raise ValueError(f"{method} compares answers to one prompt; train.samples is {samples}, give 2 or more")
    scale = scale or made.scale

    def score(
        variables: Mapping,
        tokens: Tokens,
        episode: Int[Array, "B T"],
        given: Float[Array, "N"],
        silent: Bool[Array, "N"],
        kl_coef: Float[Array, ""],
    ) -> Judged:
        how = {"temperature": temperature, "reference": reference, "judge": judge, "pieces": pieces, "chunk": chunk}
        found = assess(model, variables, tokens, old=old or reference, **how)
        rewards = rewarded(found, episode, given, judge_weight)
        whole = losses.shift(tokens.tokens, tokens.mask, tokens.segments)[1]
        tokens = heard(tokens, episode, silent)
        learned = losses.shift(tokens.tokens, tokens.mask, tokens.segments)[1]
        charged = reference and made.charges
        cost = (
            kl_coef * losses.kl(found.old, found.reference, whole, estimator="k1")
            if charged
            else jnp.zeros(episode.shape)
        )
        groups = rewards.reshape(-1, samples)
        match made.advantage:
            case "group":
                one = losses.group(groups, scale=scale)
            case "leave_one_out":
                one = losses.leave_one_out(groups - each(cost, episode, len(rewards)).reshape(groups.shape))
            case "group_reward_to_go":
                one = losses.group(groups, scale="none")
            case _:
                one = jnp.nan_to_num(groups)
        advantage = jnp.where(learned, spread(one.ravel(), episode), 0.0)
        if made.advantage.endswith("reward_to_go"):
            advantage = losses.reinforce(jnp.where(losses.last(learned), advantage, 0.0) - cost, learned)
        deviation = jnp.nan_to_num(jnp.nanstd(groups, axis=1))  # nan: no answer of the group has a reward
        alike = ~(jnp.nanmin(groups, axis=1) < jnp.nanmax(groups, axis=1))  # a deviation of equal ones is rounded
        metrics = {"reward_deviation": deviation.mean(), "alike": alike.mean()}
        metrics |= told(found, learned, "k3" if reference else None, judge is not None)
        nothing = jnp.zeros_like(advantage)
        return Judged(rollouts(tokens, found, advantage, nothing), rewards, metrics)

    return score


def find(method: str) -> Method:
    """A method by name.

    Raises:
      ValueError: an unknown one.
    """
    if method not in METHODS:
        raise ValueError(f"grpo.method {method!r} is not known; known are {', '.join(METHODS)}")
    return METHODS[method]
