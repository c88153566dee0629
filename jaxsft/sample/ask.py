"""What a model answers to some questions, and fills into some gaps, before training and after it."""

from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np

from jaxsft import sharding
from jaxsft.models import Model, logits
from jaxsft.sample import stops
from jaxsft.sample.draw import Config
from jaxsft.sample.generate import bucket, generate, texts


def asker(
    model: Model, tokenizer, prompts: Sequence[Sequence[int]], stop: Sequence[int], config: Config
) -> Callable[[Mapping], list[str]]:
    """Makes variables -> answers to some prompts, to compare a model before and after with the same draws.

    A prompt that leaves no room for an answer among the model's positions loses its beginning.
    """
    room = max(1, model.config.max_position - config.max_new_tokens)
    prompts = [prompt[-room:] for prompt in prompts]

    strings, how = stops.compile(config.stop, tokenizer), {"max_new_tokens": config.max_new_tokens, "stop": stop}

    def ask(variables: Mapping) -> list[str]:
        if not prompts:
            return []
        key = jax.random.key(config.seed)
        found = generate(model, variables, prompts, draw=config.draw, strings=strings, key=key, **how)
        return [text.strip() for text in texts(found, tokenizer, config.stop)]

    return ask


def filler(model: Model, tokenizer, passages: Sequence[Sequence[int]], mask_id: int) -> Callable[[Mapping], list[str]]:
    """Makes variables -> the likeliest tokens for the masks of some texts, to compare an encoder before and after.

    Args:
      model: an encoder with the head that predicts masked tokens.
      tokenizer: of transformers.
      passages: token ids, of any lengths.
      mask_id: of the mask token.
    """
    width = min(bucket(max(map(len, passages), default=1)), model.config.max_position)
    tokens = np.zeros((len(passages), width), np.int32)
    for row, passage in zip(tokens, passages, strict=True):
        row[: len(passage)] = passage
    lengths = np.array([len(passage) for passage in passages])
    segments = (np.arange(width) < lengths[:, None]).astype(np.int32)
    best = jax.jit(
        lambda variables: logits(model, variables, model.features(variables, tokens, None, segments)).argmax(-1)
    )

    def fill(variables: Mapping) -> list[str]:
        guesses = sharding.to_host(best(variables)) if passages else ()
        chosen = (guess[row == mask_id].tolist() for guess, row in zip(guesses, tokens, strict=True))
        return [", ".join(tokenizer.decode([token]).strip() for token in row) for row in chosen]

    return fill
