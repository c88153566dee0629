"""Episodes in rows: which tokens belong to one, where it ends, and sums over it.

Arrays over tokens stand at predicting positions, as `shift` gives them: entry t belongs to token t + 1, which position
t predicts. A row may hold several episodes, each a prompt and what was sampled after it:

    tokens    p p a b . p c d _    "p p" was answered by "a b .", and "p" by "c d"
    segments  1 1 1 1 1 2 2 2 0    numbered from 1 in each row; 0 is padding
    mask      0 1 1 1 0 1 1 0 0    the positions that predict a, b, ., c, d
    last      0 0 0 1 0 0 1 0 0    where an episode's score stands: the action that ended it

The learned positions of two episodes never touch, since an episode's last token predicts nothing.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def last(mask: Bool[Array, "B T"]) -> Bool[Array, "B T"]:
    """The last learned position of each episode, so that `where(last(mask), score, 0)` rewards the end.

    An episode's learned positions must be contiguous.

    Example:
      >>> last(jnp.array([[False, True, True, False, True]])).astype(int).tolist()
      [[0, 0, 1, 0, 1]]
    """
    return mask & ~jnp.pad(mask[:, 1:], ((0, 0), (0, 1)))


def episode_sum(x: Float[Array, "B T"], mask: Bool[Array, "B T"], segments: Int[Array, "B T"]) -> Float[Array, "B T"]:
    """At each token that counts, the sum of x over those of its episode; 0 elsewhere.

    Args:
      x: a number a token.
      mask: which tokens count.
      segments: which episode each token belongs to, numbered from 1 in each row; 0 for padding.

    Example:
      >>> row = jnp.array([[1, 1, 1, 2, 0]])
      >>> episode_sum(jnp.array([[1.0, 3.0, jnp.nan, 5.0, 7.0]]), jnp.array([[1, 1, 0, 1, 0]]) > 0, row).tolist()
      [[4.0, 4.0, 0.0, 5.0, 0.0]]
    """
    most = x.shape[1] + 1  # a row of T tokens has at most T episodes, and padding
    sums = jax.vmap(lambda x, where: jax.ops.segment_sum(x, where, most)[where])
    return jnp.where(mask, sums(jnp.where(mask, x, 0.0).astype(jnp.float32), segments), 0.0)


def episode_mean(x: Float[Array, "B T"], mask: Bool[Array, "B T"], segments: Int[Array, "B T"]) -> Float[Array, "B T"]:
    """At each token that counts, the mean of x over those of its episode; 0 elsewhere.

    Args:
      x, mask, segments: as for `episode_sum`.

    Example:
      >>> row = jnp.array([[1, 1, 1, 2, 0]])
      >>> episode_mean(jnp.array([[1.0, 3.0, jnp.nan, 5.0, 7.0]]), jnp.array([[1, 1, 0, 1, 0]]) > 0, row).tolist()
      [[2.0, 2.0, 0.0, 5.0, 0.0]]
    """
    return episode_sum(x, mask, segments) / jnp.maximum(episode_sum(mask, mask, segments), 1)


def episode_count(segments: Int[Array, "B T"]) -> Float[Array, ""]:
    """How many episodes the rows hold, whether or not a token of them is learned.

    Example:
      >>> float(episode_count(jnp.array([[1, 1, 2, 0], [0, 0, 0, 0]])))
      2.0
    """
    before = jnp.pad(segments[:, :-1], ((0, 0), (1, 0)))
    return ((segments > 0) & (segments != before)).sum().astype(jnp.float32)
