"""Masked tokens: what an encoder learns from text alone."""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from jaxsft import losses
from jaxsft.losses import Chunk
from jaxsft.models import Model
from jaxsft.objectives.language import Objective, expect, head_of
from jaxsft.types import Key, Sums, Tokens


def masked(
    model: Model,
    *,
    mask_id: int,
    ordinary: Int[np.ndarray, "K"],
    continues: Bool[np.ndarray, "V"] | None = None,
    rate: float = 0.15,
    chunk: Chunk | None = None,
) -> Objective:
    """Prediction of masked tokens from both sides, each where it stands; see `losses.mask_tokens`.

    A row is masked by a key of its own, made of the step's and of what the row holds. Evaluation has no key, and takes
    0 for the step's: a row then is masked alike whenever it is measured, and in whatever batch it lies.

    Args:
      model: an encoder with the head for it.
      mask_id, ordinary, continues: from `data.masking`; only tokens that are ordinary, and that the batch's mask marks,
        are chosen.
      rate: the share of them that is.
      chunk: as for `supervised`.

    Returns:
      (variables, Tokens, key) -> Sums: the summed negative log-likelihood in nats, and the number of tokens it is over.

    Raises:
      ValueError: the model does not predict masked tokens, or lacks a token; the rate is not between 0 and 1.

    Example:
      >>> from jaxsft.models import EncoderConfig, build
      >>> model = build(EncoderConfig(32, 8, 16, 2, heads=2, max_position=64))
      >>> tokens = jnp.arange(32)[None]
      >>> ones = jnp.ones_like(tokens)
      >>> objective = masked(model, mask_id=3, ordinary=np.arange(4, 32), rate=0.5)
      >>> batch = Tokens(tokens, ones > 0, tokens, ones)
      >>> sums = objective({"params": model.init(jax.random.key(0))}, batch, None)
      >>> round(float(sums.loss / sums.weight), 1)  # log 32, as the model knows nothing yet
      3.5
    """
    expect("masked", model.config)
    size = model.config.vocab_size
    if (largest := max(mask_id, int(np.max(ordinary)))) >= size:
        raise ValueError(f"the tokenizer has a token {largest}, and the model has {size} tokens; do the two belong?")
    if not 0 < rate < 1:
        raise ValueError(f"train.mask_rate is {rate}; it must be above 0 and below 1, 0.15 is usual")
    eligible = np.zeros(size, bool)
    eligible[ordinary] = True
    told = None if continues is None else jnp.asarray(continues)
    mask = functools.partial(
        losses.mask_tokens, mask_id=mask_id, ordinary=jnp.asarray(ordinary), rate=rate, continues=told
    )

    def objective(variables: Mapping, batch: Tokens, key: Key | None) -> Sums:
        candidates = batch.mask & jnp.asarray(eligible)[batch.tokens]
        key_mask, dropout = (jax.random.key(0), None) if key is None else jax.random.split(key)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key_mask, _sum(batch.tokens))
        corrupted, chosen = jax.vmap(mask)(keys, batch.tokens, candidates)
        features = model.features(variables, corrupted, batch.positions, batch.segments, dropout=dropout)
        lp = losses.logprobs(features, model.output(variables), batch.tokens, chosen, **head_of(model, chunk))
        return Sums(losses.sft(lp, chosen).sum(), chosen.sum().astype(jnp.float32), {})

    return objective


def _sum(tokens: Int[Array, "B T"]) -> Int[Array, "B"]:
    """A number of what a row holds, whatever padding follows it."""
    weights = 2 * jnp.arange(tokens.shape[1], dtype=jnp.uint32) + 1
    return (tokens.astype(jnp.uint32) * weights).sum(axis=1)
