"""InfoNCE: a question finds its passage among those of all others, and among its own hard negatives.

    candidates of q1     p1  p2  p3  n1  n2  n3      all positives of the batch, then all negatives
    is the right one      1   0   0   0   0   0
    where p3 is p1's text 1   0   .   0   0   0      left out: it is no wrong answer

The loss is that of a softmax over candidates, the more of them the better, so it wants large batches,
which `objectives.contrastive` embeds in pieces.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxsft.losses.scored import Losses

AWAY = -1e30  # of a candidate that is left out; not -inf, whose gradient in a row of nothing else is NaN


def contrastive(
    queries: Float[Array, "B D"],
    positives: Float[Array, "B D"],
    negatives: Float[Array, "B N D"] | None = None,
    *,
    scale: float = 20.0,
    symmetric: bool = False,
    texts: Int[Array, "B P"] | None = None,
    margin: float | None = None,
) -> Losses:
    """-log of the right passage's share in a softmax over scale x similarity to all candidates.

    Args:
      queries, positives: unit vectors, so that products are cosines; row i of the two belong together.
      negatives: N hard negatives of each query; every query meets those of all.
      scale: the inverse of the temperature; 20 is usual for cosines.
      symmetric: a passage is to find its question, too; the loss is the mean of both ways, and only the first has hard
        negatives.
      texts: the number of each candidate's text, positive first (P = 1 + N), -1 where there is none. A candidate with
        the text of a row's positive is no negative of that row; a row whose positive is -1 only fills the batch.
      margin: a candidate that is more similar than the positive by more than this is taken for a right one that
        nobody marked, and left out.

    Returns:
      (losses [B], metrics [B]): `accuracy`, 1 where the right passage is the most similar; `similarity` to it;
      `hardest`, the similarity to the most similar other.

    Example:
      >>> q = jnp.array([[1.0, 0.0], [0.0, 1.0]])
      >>> loss, metrics = contrastive(q, q, scale=1.0)
      >>> [round(x, 4) for x in loss.tolist()], metrics["accuracy"].tolist()  # log(1 + e^-1)
      ([0.3133, 0.3133], [1.0, 1.0])

    Source: van den Oord et al. 2018, arXiv:1807.03748, equation 4; Henderson et al. 2017, arXiv:1705.00652, equation 3;
    margin: Solatorio 2024, arXiv:2402.16829, with the model as its own guide.
    """
    B, D = queries.shape
    own = None if negatives is None else negatives.reshape(-1, D)
    candidates = positives if own is None else jnp.concatenate([positives, own])
    numbers = jnp.arange(len(candidates))
    if texts is not None:  # in the order of the candidates
        numbers = jnp.concatenate([texts[:, 0], texts[:, 1:].reshape(-1)])
    exists = numbers[:B] >= 0
    similar = jnp.einsum("qd,cd->qc", *_full(queries, candidates), precision="highest")
    right = jnp.eye(B, len(candidates), dtype=bool)
    seen = (numbers >= 0) & (numbers != numbers[:B, None]) & exists[:, None]
    positive = jnp.diagonal(similar)
    if margin is not None:
        seen &= jax.lax.stop_gradient(similar) <= jax.lax.stop_gradient(positive)[:, None] + margin
    loss = _cross_entropy(scale * similar, seen, right)
    if symmetric:
        loss = (loss + _cross_entropy(scale * similar[:, :B].T, seen[:, :B].T, right[:, :B])) / 2
    hardest = jnp.where(seen, similar, -1.0).max(axis=1)
    known = lambda x: jax.lax.stop_gradient(jnp.where(exists, x, 0.0))
    metrics = {"accuracy": positive > hardest, "similarity": positive, "hardest": hardest}
    return jnp.where(exists, loss, 0.0), {name: known(value) for name, value in metrics.items()}


def _full(*arrays: Array) -> list[Array]:
    return [x.astype(jnp.float32) for x in arrays]


def _cross_entropy(scores: Float[Array, "B C"], seen: Bool[Array, "B C"], right: Bool[Array, "B C"]) -> Array:
    scores = jnp.where(seen | right, scores, AWAY)
    return jax.nn.logsumexp(scores, axis=1) - jnp.where(right, scores, 0.0).sum(axis=1)
