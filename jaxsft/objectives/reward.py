"""The reward model: it learns to score the better of two answers higher, from pairs alone."""

from collections.abc import Mapping
from dataclasses import dataclass

from jaxtyping import Array

from jaxsft import losses
from jaxsft.losses import Chunk
from jaxsft.models import Model, scores
from jaxsft.objectives.pairs import Each, Pairwise, Whole, ends, pairwise, run
from jaxsft.types import Key


@dataclass(frozen=True)
class Config:
    """What the scores of a reward model are to be like."""

    center: float = 0.0
    """weight of the square of two scores' sum, which keeps scores near 0; 0.01 is usual"""


def bradley_terry(model: Model, *, center: float = 0.0, chunk: Chunk | None = None) -> Pairwise:
    """Bradley-Terry over pairs: each answer's score is that of its last token, whatever padding there is.

    Args:
      model: a decoder with a score, see `models.scores`.
      center: see `losses.bradley_terry`.
      chunk: unused; nothing meets a vocabulary here.

    Returns:
      the objective over `Pairs`, whose `value` is the margin by which the data want one above the other. Metrics, means
      over pairs: accuracy, margin, score, score_chosen, score_rejected.
    """

    def tell(variables: Mapping, whole: Whole, key: Key | None) -> tuple[Each, Array]:
        batch = whole.pairs
        features, balance = run(model, variables, batch, key)
        last = ends(scores(variables, features), batch)
        given = {"margin": batch.value.ravel(), "center": center, "exists": batch.exists.ravel()}
        value, metrics = losses.bradley_terry(last[..., 0].ravel(), last[..., 1].ravel(), **given)
        return {name: x.reshape(batch.exists.shape) for name, x in ({"loss": value} | metrics).items()}, balance

    return pairwise(tell, model.config.moe)
