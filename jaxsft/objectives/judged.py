"""Answers that are wanted or not, one by one: KTO and its kin."""

from collections.abc import Callable, Mapping
from typing import Any

from jaxtyping import Array, Float

from jaxsft import losses
from jaxsft.losses import Chunk, ScoredAnswers
from jaxsft.models import Model
from jaxsft.objectives.language import expect
from jaxsft.objectives.pairs import (
    Each,
    Pairwise,
    Reference,
    Whole,
    answers,
    divergence,
    existing,
    pairwise,
    read,
    reference_logprobs,
    repeated,
)
from jaxsft.types import Key, Pairs


def judged(
    model: Model, loss: str, *, reference: Reference = "live", chunk: Chunk | None = None, **options: Any
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

    def look(variables: Mapping, batch: Pairs, key: Key | None) -> tuple[Array, Array, Each, Array]:
        policy = read(model, variables, batch, key, chunk)
        now, then = answers(policy.logprobs, batch), batch.reference
        seen = {"logps": now[..., 0]}
        if reference == "live":
            old = reference_logprobs(model, variables, batch, chunk)
            then = answers(old, batch)
            seen["kl"] = divergence(policy, old, batch, sides=1)
        return now, then, {name: existing(x, batch) for name, x in seen.items()}, policy.balance

    def point(now: Array, then: Array, batch: Pairs) -> Each:
        """The point of reference that all answers of the step share, if there is one."""
        if function.point is None:
            return {}
        found = function.point(_own(now, then, batch), now[..., 1].ravel(), then[..., 1].ravel())
        return {name: repeated(value, batch) for name, value in found.items()}

    def tell(variables: Mapping, whole: Whole, key: Key | None) -> tuple[Each, Array]:
        now, then, seen, balance = look(variables, whole.pairs, key)
        shared = whole.shared or point(now, then, whole.pairs)
        share = {name: value[0, 0] for name, value in shared.items()}
        value, metrics = function.loss(_own(now, then, whole.pairs), **share)
        shaped = {name: x.reshape(whole.pairs.exists.shape) for name, x in ({"loss": value} | metrics).items()}
        return shaped | seen, balance

    def prepare(variables: Mapping, batch: Pairs, over: Callable) -> Whole:
        now, then = over(lambda *piece: look(*piece)[:2])
        return Whole(batch, point(now, then, batch), None)

    parts = lambda batch: {"reward_desirable": batch.value > 0, "reward_undesirable": batch.value <= 0}
    return pairwise(tell, model.config.moe, prepare if function.point else None, parts)


def _own(now: Float[Array, "B K 2"], then: Float[Array, "B K 2"], batch: Pairs) -> ScoredAnswers:
    own = lambda x: x[..., 0].ravel()
    return ScoredAnswers(own(now), own(then), batch.value.ravel() > 0, batch.exists.ravel())
