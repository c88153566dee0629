"""Objectives: a model and a loss make one function of variables and a batch.

    Objective = (variables, batch, key | None) -> Sums

Sums, never means: whoever adds several batches divides once. A key switches dropout on; None is for evaluation.
"""

from collections.abc import Callable, Mapping

import jax.numpy as jnp

from jaxsft import losses
from jaxsft.models import Model
from jaxsft.types import Key, Sums, Tokens

Objective = Callable[[Mapping, Tokens, Key | None], Sums]


def supervised(model: Model) -> Objective:
    """Next-token prediction of the learned tokens: SFT, and pre-training where every token is learned.

    Args:
      model: from `hub.load` or `models.build`.

    Returns:
      (variables, Tokens, key) -> Sums: the summed negative log-likelihood in nats, and the number of tokens it is over.
      In training (with a key) a mixture of experts adds `moe.balance` of the (micro)batch, times the coefficient
      router_aux_loss_coef of its config.json, for each token.

    Example:
      >>> import jax, jaxsft
      >>> model, params = jaxsft.load(jaxsft.BASE)
      >>> tokens = jnp.array([[5, 6, 7, 8]])
      >>> ones = jnp.ones_like(tokens)
      >>> sums = supervised(model)({"params": params}, Tokens(tokens, ones > 0, jnp.arange(4)[None], ones), None)
      >>> float(sums.weight)  # nothing predicts the first one
      3.0
    """

    def objective(variables: Mapping, batch: Tokens, key: Key | None) -> Sums:
        targets, mask = losses.shift(batch.tokens, batch.mask, batch.segments)
        features, crowding = model.learn(variables, batch.tokens, batch.positions, batch.segments, dropout=key)
        bent = {"scale": model.config.logit_scale, "soft_cap": model.config.logit_soft_cap}
        lp = losses.logprobs(features, model.output(variables), targets, mask, **bent)
        loss, weight, moe = losses.sft(lp, mask).sum(), mask.sum().astype(jnp.float32), model.config.moe
        if key is None or moe is None:
            return Sums(loss, weight, {})
        return Sums(loss + moe.balance * crowding * weight, weight, {"balance": crowding * weight})

    return objective
