"""Scores of texts by a reward model: one number a text, for judging answers, choosing the best of several, and RL.

Only differences of scores mean anything: a model learns which of two texts is better (`models.scores`). A text is what
the model was taught on, a prompt and an answer up to the token that ends it, so its tokens are written by the same chat
template (`data.tokenise`).
"""

import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxsft import sharding
from jaxsft.models import Model, last, scores


def rows(model: Model, variables: Mapping, tokens: Int[Array, "B T"], real: Bool[Array, "B T"]) -> Float[Array, "B"]:
    """The score of each row's text, at its last real token; a pure function, to be jitted with what is around it.

    Where the padding is, and which token it is made of, makes no difference: positions count real tokens alone.

    Args:
      model: a reward model, from `hub.load_variables(labels=1)` or a checkpoint that is one.
      variables: {"params": ..., "lora": ..., "packed": ...}.
      tokens: one text a row.
      real: False where a row is padding, before or behind the text; an attention mask.

    Raises:
      ValueError: the model is not a reward model.

    Example:
      >>> from jaxsft.models import DecoderConfig, build
      >>> model = build(DecoderConfig(32, 8, 16, 2, heads=2, kv_heads=1, head_dim=4, max_position=64, labels=1))
      >>> variables = {"params": model.init(jax.random.key(0))}
      >>> tokens = jnp.array([[5, 6, 7, 0], [0, 5, 6, 7]])
      >>> found = rows(model, variables, tokens, tokens > 0)
      >>> bool(jnp.allclose(found[0], found[1]))
      True
    """
    if not model.config.labels:
        raise ValueError(
            "this model predicts tokens and has no score of a text; choose a checkpoint whose config.json names a "
            "...ForSequenceClassification with one label, or train one: hub.load_variables(path, labels=1, key=...)"
        )
    segments = real.astype(jnp.int32)
    positions = jnp.maximum(jnp.cumsum(segments, axis=1) - 1, 0)
    return last(scores(variables, model.features(variables, tokens, positions, segments)), segments)


def texts(model: Model, variables: Mapping, texts: Sequence[Sequence[int]], *, batch_size: int = 8) -> list[float]:
    """Scores texts of any lengths, a few at a time.

    Args:
      model, variables: as for `rows`.
      texts: token ids of each, with the token that ends an answer.
      batch_size: texts in the model at one time. Rows are padded to powers of two, so that few programs are compiled.

    Returns:
      the score of each.

    Raises:
      ValueError: an empty text, one of more tokens than the model has positions, a token that it does not have, or
        not a reward model.

    Example:
      >>> import jaxsft
      >>> model, variables = jaxsft.load_variables(jaxsft.BASE, labels=1, key=jax.random.key(0))
      >>> len(texts(model, variables, [[5, 6], [7, 8, 9]]))
      2
    """
    lengths = [len(text) for text in texts]
    if not all(lengths):
        raise ValueError("every text needs at least one token; an empty one has no last token to be scored at")
    if (longest := max(lengths, default=0)) > model.config.max_position:
        raise ValueError(f"a text of {longest} tokens exceeds the model's {model.config.max_position} positions")
    largest, known = max(map(max, texts), default=0), len(variables["params"]["embed"]["table"])
    if largest >= known:
        raise ValueError(f"a text has the token {largest}, and the model {known} tokens; take its own tokenizer")
    found: list[float] = []
    for start in range(0, len(texts), batch_size):
        few = texts[start : start + batch_size]
        width = max(16, 1 << (max(map(len, few)) - 1).bit_length())
        tokens, sizes = np.zeros((batch_size, width), np.int32), np.zeros(batch_size, np.int32)
        for i, text in enumerate(few):
            tokens[i, : len(text)], sizes[i] = text, len(text)
        real = np.arange(width) < sizes[:, None]
        found += sharding.to_host(_rows(model, variables, tokens, real))[: len(few)].tolist()
    return found


_rows = functools.partial(jax.jit, static_argnums=0)(rows)
