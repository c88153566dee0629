"""The scalar head of a reward model: one number for a text, read off at its last token.

    text      <|user|> why ? <|end|> <|assistant|> so . <|end|>  .  .     segments 1 1 1 1 1 1 1 1 0 0
    scores       .     .   .    .         .        .  .    r     .  .     every token has one; r is the text's

The score of a position is w x, x its features (Stiennon et al. 2020, arXiv:2009.01325, section 3.4); a decoder sees
nothing behind a position, so only the last one has read the whole text. As in the ...ForSequenceClassification of
transformers, here with one label, there is no bias, which no comparison of two texts could tell.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def scores(variables: Mapping, features: Float[Array, "B T D"]) -> Float[Array, "B T"]:
    """The score at each token, in float32 whatever the features are: rewards differ by little.

    Args:
      variables: of a model whose config has one label.
      features: from `model.features`.

    Example:
      >>> scores({"params": {"score": {"kernel": jnp.array([[2.0], [1.0]])}}}, jnp.array([[[1.0, 3.0]]]))
      Array([[5.]], dtype=float32)
    """
    kernel = variables["params"]["score"]["kernel"].astype(jnp.float32)
    exact = jax.lax.Precision.HIGHEST
    return jnp.einsum("btd,dl->btl", features.astype(jnp.float32), kernel, precision=exact).squeeze(-1)


def last(values: Float[Array, "B T"], segments: Int[Array, "B T"]) -> Float[Array, "B"]:
    """The value at the last token of each row, wherever its padding is; 0 for a row of padding alone.

    Args:
      values: such as `scores`.
      segments: 0 where a row is padding. For rows that hold one text each.

    Example:
      >>> values = jnp.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]])
      >>> last(values, jnp.array([[1, 1, 0], [0, 1, 1], [0, 0, 0]])).tolist()
      [2.0, 6.0, 0.0]
    """
    real = segments > 0
    at = values.shape[1] - 1 - jnp.argmax(real[:, ::-1], axis=1)
    return jnp.where(real.any(axis=1), jnp.take_along_axis(values, at[:, None], axis=1)[:, 0], 0)
