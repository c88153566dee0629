"""Policy losses: sampled tokens become likelier or less likely, by their advantages, within bounds.

All look at the ratio of the policy and the one that the tokens were drawn from, and differ in whether it is a token's
or a whole episode's, and in what they do where it leaves [1 - low, 1 + high]:

    ppo      rho = pi / old of each token                        clipped
    cispo    the same                                            capped, and only a weight: every token has a gradient
    gspo     rho = exp(mean over the episode of log pi / old)    clipped
    rloo     rho = exp(sum over the episode of log pi / old)     clipped

    (logprobs, old, advantages, mask, segments, *, ...) -> Policy(loss, clipped, ratio), each a number a token

Arrays stand as in episodes.py, and whatever is off the mask is 0 in what comes back and never looked at. Which loss
goes with which sum over tokens, `LOSS_TYPES` in aggregate.py says. A log-ratio is at most 80, where float32 still holds
its exponential; beyond, there is no gradient.
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxsft.losses.divergence import LARGEST
from jaxsft.losses.episodes import episode_mean, episode_sum


class Policy(NamedTuple):
    """Of every token; 0 and False where the mask is False."""

    loss: Float[Array, "B T"]
    clipped: Bool[Array, "B T"]  # the ratio is beyond its bound on the side that the advantage pushes to
    ratio: Float[Array, "B T"]


def ppo(
    logprobs: Float[Array, "B T"],
    old: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    segments: Int[Array, "B T"] | None = None,
    *,
    low: float = 0.2,
    high: float = 0.2,
    delta: float | None = None,
) -> Policy:
    """PPO's clipped surrogate, which is GRPO's, too: -min(rho A, clip(rho, 1 - low, 1 + high) A).

    Args:
      logprobs: of the tokens, under the policy that learns.
      old: of the tokens, under the one that drew them.
      advantages: a token's, or its episode's.
      mask: which tokens are learned.
      segments: not needed.
      low: how far a bad token's ratio may fall (TRL: epsilon).
      high: how far a good token's may rise (TRL: epsilon_high); DAPO's clip-higher has 0.28.
      delta: the most that a ratio counts. It matters where A < 0, whose loss has no bound without it: the dual clip of
        Ye et al., the two-sided clip of INTELLECT-2 (TRL: delta). It should be above 1 + high.

    Example:
      >>> lp, one = jnp.log(jnp.array([[1.5, 1.5, 9.0]])), jnp.array([[1.0, -1.0, 0.0]])
      >>> loss, clipped, ratio = ppo(lp, 0 * lp, one, jnp.array([[True, True, False]]))
      >>> [round(x, 3) for x in loss[0].tolist()], clipped.tolist()
      ([-1.2, 1.5, 0.0], [[True, False, False]])

    Source: Schulman et al. 2017, arXiv:1707.06347, equation 7; high: Yu et al. 2025, arXiv:2503.14476, section 3.1;
    delta: Ye et al. 2019, arXiv:1912.09729, equation 5, and Prime Intellect 2025, arXiv:2505.07291, section 3.4.
    """
    return _clipped(_log_ratio(logprobs, old, mask), advantages, mask, low, high, delta)


def cispo(
    logprobs: Float[Array, "B T"],
    old: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    segments: Int[Array, "B T"] | None = None,
    *,
    cap: float = 5.0,
) -> Policy:
    """CISPO: -stop_gradient(min(rho, cap)) A lp. A clipped token still learns; its weight is bounded.

    Args:
      logprobs, old, advantages, mask, segments: as in `ppo`.
      cap: the most that a token weighs: 1 + epsilon_high of the paper, which leaves the other side open. TRL names the
        cap itself epsilon_high, and recommends 5, after arXiv:2510.13786.

    Example:
      >>> lp = jnp.log(jnp.array([[0.5]]))
      >>> pull = jax.grad(lambda lp: cispo(lp, lp - jnp.log(9.0), 2 * jnp.ones((1, 1)), lp < 0).loss.sum())(lp)
      >>> pull.tolist()  # -cap A
      [[-10.0]]

    Source: MiniMax 2025, arXiv:2506.13585, equations 4 and 5.
    """
    ratio = jnp.exp(_log_ratio(logprobs, old, mask))
    known = lambda x: jnp.where(mask, x, 0.0).astype(jnp.float32)
    advantages = known(advantages)
    loss = -jax.lax.stop_gradient(jnp.minimum(ratio, cap)) * advantages * known(logprobs)
    return Policy(loss, mask & (ratio > cap) & (advantages > 0), known(ratio))


def gspo(
    logprobs: Float[Array, "B T"],
    old: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    segments: Int[Array, "B T"],
    *,
    low: float = 3e-4,
    high: float = 4e-4,
    delta: float | None = None,
) -> Policy:
    """GSPO: `ppo` with the episode's ratio, exp(mean over its tokens of log pi / old), at each of its tokens.

    So an episode is clipped as a whole. The ratio is a geometric mean, which is much nearer to 1 than a token's, and so
    are its bounds; they are the paper's. (TRL has importance_sampling_level="sequence", with epsilon 0.2 if none is
    given, at which next to nothing is ever clipped.)

    Args:
      logprobs, old, advantages, mask: as in `ppo`.
      segments: which episode each token belongs to.
      low, high, delta: as in `ppo`, of the episode's ratio.

    Example:
      >>> old, here = jnp.zeros((1, 3)), jnp.array([[1, 1, 2]])
      >>> gspo(jnp.log(jnp.array([[1.0, 4.0, 3.0]])), old, old + 1, here > 0, here).ratio.round(3).astype(int).tolist()
      [[2, 2, 3]]

    Source: Zheng et al. 2025, arXiv:2507.18071, equations 5 and 7; bounds: section 5.1. Its GSPO-token, for advantages
    that differ within an episode, has the same gradient where they do not; neither TRL nor this has it.
    """
    mean = episode_mean(_log_ratio(logprobs, old, mask), mask, segments)
    return _clipped(mean, advantages, mask, low, high, delta)


def rloo(
    logprobs: Float[Array, "B T"],
    old: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    segments: Int[Array, "B T"],
    *,
    low: float = 0.2,
    high: float = 0.2,
    delta: float | None = None,
) -> Policy:
    """RLOO as TRL has it: `ppo` with the episode's ratio, exp(sum over its tokens of log pi / old).

    The whole answer is one action. With one update a rollout the ratio is 1, and the gradient REINFORCE's, that of
    -A sum_t lp_t. Every token of an episode has the episode's loss, so the sum over tokens is to be `sequence`.

    Args:
      logprobs, old, advantages, mask, segments, low, high, delta: as in `gspo`.

    Example:
      >>> old, here = jnp.zeros((1, 3)), jnp.array([[1, 1, 2]])
      >>> rloo(jnp.log(jnp.array([[1.0, 4.0, 3.0]])), old, old + 1, here > 0, here).ratio.round(3).astype(int).tolist()
      [[4, 4, 3]]

    Source: Ahmadian et al. 2024, arXiv:2402.14740, section 3; the clipping is TRL's.
    """
    total = episode_sum(_log_ratio(logprobs, old, mask), mask, segments)
    return _clipped(total, advantages, mask, low, high, delta)


def surrogate(name: str, **options: Any) -> Callable[..., Policy]:
    """A loss of POLICY with its options: (logprobs, old, advantages, mask, segments) -> Policy.

    Raises:
      ValueError: no such loss; an option that it does not take.

    Example:
      >>> surrogate("cispo", low=0.2)
      Traceback (most recent call last):
      ValueError: cispo takes no low; there are cap
    """
    if name not in POLICY:
        raise ValueError(f"there is no policy loss '{name}'; there are {', '.join(POLICY)}")
    parameters = inspect.signature(POLICY[name]).parameters.values()
    taken = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    if stray := sorted(set(options) - set(taken)):
        raise ValueError(f"{name} takes no {', '.join(stray)}; there are {', '.join(taken)}")
    return lambda *arrays: POLICY[name](*arrays, **options)


POLICY: dict[str, Callable[..., Policy]] = {"ppo": ppo, "cispo": cispo, "gspo": gspo, "rloo": rloo}


def _log_ratio(logprobs, old, mask):
    return jnp.minimum(jnp.where(mask, logprobs - old, 0.0).astype(jnp.float32), LARGEST)


def _clipped(log_ratio, advantages, mask, low, high, delta):
    known = lambda x: jnp.where(mask, x, 0.0).astype(jnp.float32)
    advantages, ratio = known(advantages), jnp.exp(jnp.minimum(log_ratio, LARGEST))
    most = ratio if delta is None else jnp.minimum(ratio, delta)
    loss = -jnp.minimum(most * advantages, jnp.clip(ratio, 1 - low, 1 + high) * advantages)
    beyond = ((ratio < 1 - low) & (advantages < 0)) | ((ratio > 1 + high) & (advantages > 0))
    return Policy(known(loss), mask & beyond, known(ratio))
