"""The policy: it learns from answers that it drew itself, by how much better they were than expected."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jaxsft import losses
from jaxsft.losses import Chunk
from jaxsft.models import Model
from jaxsft.objectives.episodes import policy_of, read, values
from jaxsft.objectives.language import Objective, expect
from jaxsft.types import Key, Mean, Metrics, Rollouts, Sums


def policy(
    model: Model,
    *,
    loss: str = "ppo",
    bounds: Mapping[str, float] | None = None,
    aggregate: str = "token",
    max_new_tokens: int | None = None,
    temperature: float = 1.0,
    kl_coef: float = 0.0,
    entropy_coef: float = 0.0,
    value_coef: float | None = None,
    value_clip: float | None = 0.2,
    chunk: Chunk | None = None,
) -> Objective:
    """The losses of PPO, GRPO and their kin over `Rollouts`.

        clipped surrogate + value_coef value loss + kl_coef k3 - entropy_coef entropy

    Args:
      model: a decoder.
      loss: of `losses.POLICY`.
      bounds: its options, such as {"low": 0.2, "high": 0.28}; by default its own.
      aggregate: of `losses.AGGREGATES`, what the loss is a mean over.
      max_new_tokens: the most tokens of an answer, for "fixed".
      temperature: that the answers were drawn at.
      kl_coef: of the divergence from `Rollouts.reference`.
      entropy_coef: of the entropy, which it rewards.
      value_coef: of the critic's loss; None for no critic.
      value_clip: how far a value may move from `Rollouts.value`.
      chunk: as for `supervised`.

    Returns:
      (variables, Rollouts, key) -> Sums; there is no dropout, since answers were drawn without. Metrics, means over the
      learned tokens: policy_loss, entropy, ratio, clip_fraction, drift (k2 of the policy and itself as it drew); with a
      critic value_loss, value_clip_fraction; with `kl_coef` kl_loss.

    Raises:
      ValueError: an encoder or a reward model; an unknown loss, aggregate or bound.
    """
    expect("causal", model.config)
    surrogate = losses.surrogate(loss, **(bounds or {}))

    def objective(variables: Mapping, batch: Rollouts, key: Key | None) -> Sums:
        how = {"temperature": temperature, "learned_entropy": bool(entropy_coef), "chunk": chunk}
        found = read(model, policy_of(variables), batch, None, **how)  # with dropout the ratio would be noise
        learned, lp = found.learned, found.logprobs
        old = jnp.where(batch.fresh, jax.lax.stop_gradient(lp), batch.old)
        moved = surrogate(lp, old, batch.advantage, learned, batch.segments)
        each = moved.loss
        tokens = learned.sum().astype(jnp.float32)
        over_tokens = lambda x: Mean(jnp.where(learned, jax.lax.stop_gradient(x), 0).sum(dtype=jnp.float32), tokens)
        metrics: Metrics = {
            "policy_loss": over_tokens(moved.loss),
            "entropy": over_tokens(found.entropy),
            "ratio": over_tokens(moved.ratio),
            "clip_fraction": over_tokens(moved.clipped),
            "drift": over_tokens(losses.kl(lp, old, learned, estimator="k2")),
        }
        if entropy_coef:
            each = each - entropy_coef * found.entropy
        if kl_coef:
            divergence = losses.kl(lp, batch.reference, learned)
            each = each + kl_coef * divergence
            metrics["kl_loss"] = over_tokens(divergence)
        if value_coef is not None:
            value = values(model, variables, batch, found.features, None)
            error = losses.clipped_value(value, batch.value, batch.returns, learned, clip=value_clip)
            each = each + value_coef * error.loss
            metrics |= {"value_loss": over_tokens(error.loss), "value_clip_fraction": over_tokens(error.clipped)}
        share, weight = losses.aggregate(aggregate, learned, batch.segments, max_new_tokens=max_new_tokens)
        total = jnp.where(learned, share * each, 0.0).sum()
        moe = model.config.moe
        if key is not None and moe is not None:
            total, metrics["balance"] = total + moe.balance * found.balance * weight, found.balance * weight
        return Sums(total, weight, metrics)

    return objective
