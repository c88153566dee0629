"""Answers that are wanted or not, one by one: KTO and its kin."""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from jaxsft import losses
from jaxsft.losses import ScoredAnswers
from jaxsft.models import Model
from jaxsft.objectives.language import expect
from jaxsft.objectives.pairs import (
    Each,
    Known,
    Pairwise,
    Read,
    Reference,
    answers,
    before,
    divergence,
    known,
    read,
    sums,
)
from jaxsft.types import Key, Mean, Pairs, Sums


def judged(
    model: Model, loss: str, *, reference: Reference = "live", chunk: int | None = None, **options: Any
) -> Pairwise:
    """Losses over answers that are wanted or not, see `losses.UNPAIRED`.

    Of each of the `Pairs` the first answer is judged, `value` says whether it is wanted, and the second is an answer to
    another prompt, from which KTO estimates how far the policy is from the reference, over the whole step.

    Args:
      model, reference, chunk: as for `preference`.
      loss: "kto", "apo_zero_unpaired" or "bco".
      options: of the loss.

    Returns:
      the objective over `Pairs`. Metrics: reward; reward_desirable and reward_undesirable, means over the answers of
      either kind; logps, of whole answers; kl.

    Raises:
      ValueError: an encoder, an unknown loss, an option that it does not take.
    """
    expect("causal", model.config)
    function = losses.unpaired(loss, **options)

    def look(variables: Mapping, batch: Pairs, key: Key | None) -> tuple[Array, Array, Each, Read]:
        policy = read(model, variables, batch, key, chunk)
        now, then = answers(policy.logprobs, batch), batch.reference
        seen = {"logps": now[..., 0]}
        if reference == "live":
            old = before(model, variables, batch, chunk)
            then = answers(old, batch)
            seen["kl"] = divergence(policy, old, batch, sides=1)
        return now, then, {name: known(x, batch) for name, x in seen.items()}, policy

    def point(now: Array, then: Array, batch: Pairs) -> dict[str, Array]:
        """The point of reference that all answers of the step share, if there is one."""
        if function.point is None:
            return {}
        exists = batch.exists.ravel()
        mine = ScoredAnswers(now[..., 0].ravel(), then[..., 0].ravel(), batch.value.ravel() > 0, exists)
        return function.point(mine, now[..., 1].ravel(), then[..., 1].ravel())

    def each(variables: Mapping, batch: Pairs | Known, key: Key | None = None) -> tuple[Each, Pairs, Read]:
        pairs, whole = batch if isinstance(batch, Known) else (batch, {})
        now, then, seen, policy = look(variables, pairs, key)
        shared = {name: x[0, 0] for name, x in whole.items()} or point(now, then, pairs)
        mine = ScoredAnswers(now[..., 0].ravel(), then[..., 0].ravel(), pairs.value.ravel() > 0, pairs.exists.ravel())
        value, metrics = function.loss(mine, **shared)
        shaped = {name: x.reshape(pairs.exists.shape) for name, x in ({"loss": value} | metrics).items()}
        return shaped | seen, pairs, policy

    def objective(variables: Mapping, batch: Pairs | Known, key: Key | None) -> Sums:
        found, pairs, policy = each(variables, batch, key)
        moe, value = model.config.moe, found.pop("loss")
        total = sums(value, found, pairs, None if key is None or moe is None else moe.balance * policy.balance)
        wanted = (pairs.value > 0) & pairs.exists
        split = {"reward_desirable": wanted, "reward_undesirable": pairs.exists & ~wanted}
        means = {name: Mean(found[name].sum(), label.sum().astype(jnp.float32)) for name, label in split.items()}
        return total._replace(metrics=total.metrics | means)

    def prepare(variables: Mapping, batch: Pairs, over: Callable) -> Known:
        now, then = over(lambda *piece: look(*piece)[:2])
        return Known(batch, {n: jnp.full(batch.exists.shape, x) for n, x in point(now, then, batch).items()})

    return Pairwise(objective, prepare if function.point else None, lambda variables, batch: each(variables, batch)[0])
