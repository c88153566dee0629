"""Next-token prediction, and which objectives a model can have at all."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax.numpy as jnp

from jaxsft import losses
from jaxsft.losses import Chunk
from jaxsft.models import EncoderConfig, Model, ModelConfig
from jaxsft.types import Key, Sums, Tokens

Objective = Callable[[Mapping, Any, Key | None], Sums]  # of variables and a batch: Tokens, Pairs


def expect(objective: Literal["causal", "masked", "score"], config: ModelConfig, length: int | None = None) -> None:
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
    if objective == "score" and isinstance(config, EncoderConfig):
        raise ValueError("an encoder has no score of a text here; a reward model is made of a decoder, such as llama")
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


def head_of(model: Model, chunk: Chunk | None = None) -> dict[str, Any]:
    """How and where a model makes scores of its features: the keywords of `losses.logprobs`.

    Example:
      >>> import jaxsft
      >>> head_of(jaxsft.load(jaxsft.BASE)[0])["soft_cap"] is None
      True
    """
    scale, soft_cap = model.config.logit_scale, model.config.logit_soft_cap
    return {"scale": scale, "soft_cap": soft_cap, "chunk": chunk, "mesh": model.mesh}


def supervised(model: Model, *, chunk: Chunk | None = None) -> Objective:
    """Next-token prediction of the learned tokens: SFT, and pre-training where every token is learned.

    Args:
      model: from `hub.load` or `models.build`.
      chunk: how many scores exist at one time, see `losses.logprobs`.

    Returns:
      (variables, Tokens, key) -> Sums: the summed negative log-likelihood in nats, and the number of tokens it is over.
      In evaluation (without a key) the metric accuracy is the share of tokens that the model finds the most likely.
      In training a mixture of experts adds `moe.balance` of the (micro)batch, times the coefficient
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
        given, weight, moe = (model.output(variables), targets, mask), mask.sum().astype(jnp.float32), model.config.moe
        if key is None:
            lp, best = losses.top1(features, *given, **head_of(model, chunk))
            right = (mask & (best == targets)).sum().astype(jnp.float32)
            return Sums(losses.sft(lp, mask).sum(), weight, {"accuracy": right})
        loss = -losses.total(features, *given, **head_of(model, chunk))
        if moe is None:
            return Sums(loss, weight, {})
        return Sums(loss + moe.balance * crowding * weight, weight, {"balance": crowding * weight})

    return objective
