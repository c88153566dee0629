"""Masked tokens: what an encoder learns to fill in, drawn anew each time a row comes."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jaxsft.types import Key

MASKED, CHANGED = 0.8, 0.1  # of the chosen tokens; the rest stay, as a text that is used later has no masks in it


def mask_tokens(
    key: Key,
    tokens: Int[Array, "*B T"],
    candidates: Bool[Array, "*B T"],
    *,
    mask_id: int,
    ordinary: Int[Array, "K"],
    rate: float = 0.15,
    continues: Bool[Array, "V"] | None = None,
) -> tuple[Int[Array, "*B T"], Bool[Array, "*B T"]]:
    """Chooses tokens to predict, and hides most of them: 80% by the mask, 10% by any other token, 10% not at all.

        tokens      [CLS] the lamp ##s were lit [SEP]
        candidates    0    1   1    1   1    1    0
        chosen        0    0   1    1   0    0    0     a whole word; alone, each token has its own luck
        corrupted   [CLS] the  M    M  were lit [SEP]

    Each token, or word, is chosen on its own with probability `rate`, so now and then a row has none; how a chosen
    token is hidden is drawn for each token. (BERT took a share of each row, and any token of the vocabulary in place of
    another; here special tokens are never put in.)

    Args:
      key: of the draw.
      tokens: token ids.
      candidates: which may be chosen: no special tokens, no padding.
      mask_id: of the mask token.
      ordinary: the ids that may stand in for a chosen token.
      rate: the probability of being chosen.
      continues: for every id of the vocabulary, whether it goes on with a word; then whole words are chosen.

    Returns:
      (corrupted, chosen): what the model reads, and where it is to say what stood there.

    Example:
      >>> row = jnp.full((1, 10_000), 7)
      >>> corrupted, chosen = mask_tokens(jax.random.key(0), row, row > 0, mask_id=1, ordinary=jnp.array([8, 9]))
      >>> round(float(chosen.mean()), 2), round(float((corrupted == 1).sum() / chosen.sum()), 1)
      (0.15, 0.8)

    Source: Devlin et al. 2018, arXiv:1810.04805, section 3.1; anew each time: Liu et al. 2019, arXiv:1907.11692, 4.1;
    whole words: google-research/bert, the note of May 31st, 2019.
    """
    key_choice, key_way, key_other = jax.random.split(key, 3)
    luck = jax.random.uniform(key_choice, tokens.shape)
    if continues is not None:
        before = jnp.pad(candidates[..., :-1], [(0, 0)] * (tokens.ndim - 1) + [(1, 0)])
        begins = ~(continues[tokens] & candidates & before)
        first = jax.lax.cummax(jnp.where(begins, jnp.arange(tokens.shape[-1]), 0), axis=tokens.ndim - 1)
        luck = jnp.take_along_axis(luck, first, axis=-1)  # that of the word's first token
    chosen = candidates & (luck < rate)
    way = jax.random.uniform(key_way, tokens.shape)
    other = ordinary[jax.random.randint(key_other, tokens.shape, 0, len(ordinary))]
    hidden = jnp.where(way < MASKED, mask_id, jnp.where(way < MASKED + CHANGED, other, tokens))
    return jnp.where(chosen, hidden, tokens), chosen
