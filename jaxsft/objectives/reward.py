"""The reward model: it learns to score the better of two answers higher, from pairs alone."""

from collections.abc import Mapping
from dataclasses import dataclass

from jaxsft import losses
from jaxsft.models import Model, scores
from jaxsft.objectives.pairs import Each, Pairwise, ends, run, sums
from jaxsft.types import Key, Pairs, Sums


@dataclass(frozen=True)
class Config:
    """What the scores of a reward model are to be like."""

    center: float = 0.0
    """weight of the square of two scores' sum, which keeps scores near 0; 0.01 is usual"""


def bradley_terry(model: Model, *, center: float = 0.0, chunk: int | None = None) -> Pairwise:
    """Bradley-Terry over pairs: each answer's score is that of its last token, whatever padding there is.

    Args:
      model: a decoder with a score, see `models.scores`.
      center: see `losses.bradley_terry`.
      chunk: unused; nothing meets a vocabulary here.

    Returns:
      the objective over `Pairs`, whose `value` is the margin by which the data want one above the other. Metrics, means
      over pairs: accuracy, margin, score, score_chosen, score_rejected.
    """

    def found(variables: Mapping, batch: Pairs, key: Key | None):
        features, balance = run(model, variables, batch, key)
        last = ends(scores(variables, features), batch)
        sides = (last[..., 0].ravel(), last[..., 1].ravel())
        given = {"margin": batch.value.ravel(), "center": center, "exists": batch.exists.ravel()}
        value, metrics = losses.bradley_terry(*sides, **given)
        shaped: Each = {name: x.reshape(batch.exists.shape) for name, x in metrics.items()}
        return value.reshape(batch.exists.shape), shaped, balance

    def objective(variables: Mapping, batch: Pairs, key: Key | None) -> Sums:
        value, metrics, balance = found(variables, batch, key)
        moe = model.config.moe
        return sums(value, metrics, batch, None if key is None or moe is None else moe.balance * balance)

    def each(variables: Mapping, batch: Pairs) -> Each:
        value, metrics, _ = found(variables, batch, None)
        return {"loss": value} | metrics

    return Pairwise(objective, None, each)
