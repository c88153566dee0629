"""Objectives: a model and a loss make one function of variables and a batch.

    Objective = (variables, batch, key | None) -> Sums

Sums, never means: whoever adds several batches divides once. A key switches dropout on; None is for evaluation.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from jaxsft import losses
from jaxsft.models import EncoderConfig, Model, ModelConfig
from jaxsft.types import Key, Sums, Tokens

Objective = Callable[[Mapping, Tokens, Key | None], Sums]


def expect(objective: Literal["causal", "masked"], config: ModelConfig, length: int | None = None) -> None:
    """Refuses an objective that a model cannot have, and rows longer than its table of positions.

    Raises:
      ValueError: next-token prediction with an encoder or a reward model, masked tokens with a decoder or with an
        encoder without head; `length` tokens a row where positions are learned, and fewer.

    Example:
      >>> from jaxsft.models import DecoderConfig
      >>> expect("masked", DecoderConfig(32, 8, 16, 2, heads=2, kv_heads=1, head_dim=4, max_position=64))
      Traceback (most recent call last):
      ValueError: train.objective masked is for encoders, ...
    """
    if objective == "causal" and isinstance(config, EncoderConfig):
        raise ValueError(
            "an encoder reads the next token before it predicts it, so it learns nothing from that; train it with "
            "scripts/pretrain.py --train.objective masked, or choose a decoder"
        )
    if objective == "causal" and config.labels:
        raise ValueError(
            "this model scores whole texts: config.json's architectures name a ...ForSequenceClassification, which has "
            "no output layer to predict the next token with. Choose the language model that it was made from"
        )
    if objective == "masked" and not isinstance(config, EncoderConfig):
        raise ValueError(
            "train.objective masked is for encoders, and this model is a decoder, which sees nothing behind a gap; "
            "choose an encoder such as bert-base-uncased, or train.objective causal"
        )
    if objective == "masked" and not config.mlm:  # type: ignore[union-attr]
        raise ValueError(
            "this encoder has no head that predicts masked tokens: config.json's architectures name no ...ForMaskedLM. "
            "Choose a checkpoint with one (a sentence encoder's base has it)"
        )
    table = isinstance(config, EncoderConfig) or config.learned_positions
    if table and length is not None and length > config.max_position:
        raise ValueError(
            f"data.max_length is {length}, and the model has {config.max_position} positions; set data.max_length to "
            f"{config.max_position} or less"
        )


def supervised(model: Model, *, chunk: int | None = None) -> Objective:
    """Next-token prediction of the learned tokens: SFT, and pre-training where every token is learned.

    Args:
      model: from `hub.load` or `models.build`.
      chunk: tokens whose scores exist at one time, see `losses.logprobs`.

    Returns:
      (variables, Tokens, key) -> Sums: the summed negative log-likelihood in nats, and the number of tokens it is over.
      In training (with a key) a mixture of experts adds `moe.balance` of the (micro)batch, times the coefficient
      router_aux_loss_coef of its config.json, for each token.

    Raises:
      ValueError: the model is an encoder.

    Example:
      >>> import jaxsft
      >>> model, params = jaxsft.load(jaxsft.BASE)
      >>> tokens = jnp.array([[5, 6, 7, 8]])
      >>> ones = jnp.ones_like(tokens)
      >>> sums = supervised(model)({"params": params}, Tokens(tokens, ones > 0, jnp.arange(4)[None], ones), None)
      >>> float(sums.weight)  # nothing predicts the first one
      3.0
    """
    expect("causal", model.config)

    def objective(variables: Mapping, batch: Tokens, key: Key | None) -> Sums:
        targets, mask = losses.shift(batch.tokens, batch.mask, batch.segments)
        features, crowding = model.learn(variables, batch.tokens, batch.positions, batch.segments, dropout=key)
        bent = {"scale": model.config.logit_scale, "soft_cap": model.config.logit_soft_cap, "chunk": chunk}
        lp = losses.logprobs(features, model.output(variables), targets, mask, **bent)
        loss, weight, moe = losses.sft(lp, mask).sum(), mask.sum().astype(jnp.float32), model.config.moe
        if key is None or moe is None:
            return Sums(loss, weight, {})
        return Sums(loss + moe.balance * crowding * weight, weight, {"balance": crowding * weight})

    return objective


def masked(
    model: Model,
    *,
    mask_id: int,
    ordinary: Int[np.ndarray, "K"],
    continues: Bool[np.ndarray, "V"] | None = None,
    rate: float = 0.15,
    chunk: int | None = None,
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
        lp = losses.logprobs(features, model.output(variables), batch.tokens, chosen, chunk=chunk)
        return Sums(losses.sft(lp, chosen).sum(), chosen.sum().astype(jnp.float32), {})

    return objective


def _sum(tokens: Int[Array, "B T"]) -> Int[Array, "B"]:
    """A number of what a row holds, whatever padding follows it."""
    weights = 2 * jnp.arange(tokens.shape[1], dtype=jnp.uint32) + 1
    return (tokens.astype(jnp.uint32) * weights).sum(axis=1)
