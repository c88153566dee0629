"""Retrievers: questions and passages become vectors, and each question is to find its passage in the whole batch.

The loss of a row depends on all rows of the step, so a batch cannot be cut into microbatches. But only the vectors have
to meet: they are computed piece by piece, and of a piece nothing but its vectors is kept. The backward pass first
has the loss's gradient by the vectors, and then goes through the pieces, each computed again, with the same dropout, as
it is a function of the same key (Gao et al. 2021, arXiv:2101.06983, GradCache: here it is what `jax.checkpoint` makes
of a loop). Memory is that of one piece, and the gradient that of the whole.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxsft import losses, sharding
from jaxsft.models import Model
from jaxsft.objectives.language import Objective
from jaxsft.types import Contrasts, Key, Sums

Pool = Callable[[Float[Array, "B T D"], Bool[Array, "B T"]], Float[Array, "B E"]]


def contrastive(
    model: Model,
    pool: Pool,
    *,
    scale: float = 20.0,
    symmetric: bool = False,
    margin: float | None = None,
    pieces: int = 1,
) -> Objective:
    """InfoNCE over the batch, see `losses.contrastive`.

    Args:
      model: an encoder or decoder without a head.
      pool: (features, real) -> unit vectors, real where there is no padding.
      scale, symmetric, margin: of the loss.
      pieces: in which the batch is embedded, one after the other; the loss is the same.

    Returns:
      (variables, Contrasts, key) -> Sums over the batch's questions. Metrics: accuracy, similarity, hardest.
    """

    def embed(variables: Mapping, tokens: Int[Array, "B T"], sizes: Int[Array, "B"], key: Key | None) -> Array:
        real = jnp.arange(tokens.shape[1]) < sizes[:, None]
        segments = real.astype(jnp.int32)
        positions = jnp.maximum(jnp.cumsum(segments, axis=1) - 1, 0)
        return pool(model.features(variables, tokens, positions, segments, dropout=key), real)

    def both(variables: Mapping, batch: Contrasts, key: Key | None) -> tuple[Array, Array]:
        B, P, T = batch.passages.shape
        first, second = (None, None) if key is None else jax.random.split(key)
        passages = embed(variables, batch.passages.reshape(B * P, T), batch.passage_sizes.reshape(-1), second)
        return embed(variables, batch.queries, batch.query_sizes[:, 0], first), passages.reshape(B, P, -1)

    def objective(variables: Mapping, batch: Contrasts, key: Key | None) -> Sums:
        if pieces == 1:
            queries, passages = both(variables, batch, key)
        else:
            keys = None if key is None else jax.random.split(key, pieces)
            again = jax.checkpoint(lambda piece: both(variables, *piece))
            queries, passages = sharding.join(jax.lax.map(again, (sharding.cut(batch, pieces), keys)))
        given = {"scale": scale, "symmetric": symmetric, "margin": margin, "texts": batch.texts}
        hard = passages[:, 1:] if passages.shape[1] > 1 else None
        loss, metrics = losses.contrastive(queries, passages[:, 0], hard, **given)
        weight = (batch.texts[:, 0] >= 0).sum().astype(jnp.float32)
        return Sums(loss.sum(), weight, {name: value.sum() for name, value in metrics.items()})

    return objective
