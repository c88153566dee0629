"""What all networks of images share: an image's vector, and the layer that makes class scores of it.

The vector has a 1 behind it where there is a classifier, whose bias is the last column of its table, as in an encoder:

    features  [x_1 ... x_D  1]     table  [[w_11 ... w_1D  b_1], ...]     scores = features table^T

Pooling is that of transformers' ...ForImageClassification: the class token, the mean over patches, or both; with `none`
there is no classifier, and the features are the last hidden states, [B, T, D], as other programs give them.
"""

from collections.abc import Mapping
from typing import Literal, NoReturn, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxsft.tree import Tree
from jaxsft.types import Key

Pooling = Literal["cls", "mean", "cls+mean", "none"]


class Classifies(Protocol):
    """What of a config is asked here."""

    @property
    def hidden(self) -> int: ...
    @property
    def labels(self) -> int: ...
    @property
    def pooling(self) -> Pooling: ...


def as_token(config: Classifies, vector: Float[Array, "B D"]) -> Float[Array, "B 1 E"]:
    """An image's vector as `features`, with a 1 behind it where a classifier reads it.

    Example:
      >>> class Config: hidden, labels, pooling = 2, 3, "mean"
      >>> as_token(Config(), jnp.zeros((4, 2))).shape
      (4, 1, 3)
    """
    if config.labels:
        vector = jnp.concatenate([vector, jnp.ones((len(vector), 1), vector.dtype)], axis=-1)
    return vector[:, None]


def init(config: Classifies, key: Key) -> Tree:
    """The classifier's parameters, {} where there is none."""
    if not config.labels:
        return {}
    kernel = 0.02 * jax.random.normal(key, (config.hidden, config.labels))
    return {"classifier": {"kernel": kernel, "bias": jnp.zeros(config.labels)}}


def table(config: Classifies, variables: Mapping) -> Float[Array, "K E"]:
    """The table that makes class scores of features.

    Raises:
      ValueError: the model has no classifier.
    """
    if not config.labels:
        raise ValueError(
            "this model of images has no classifier, so there are no scores; load it with labels=N and a key, or choose"
            " a checkpoint whose config.json names a ...ForImageClassification among its architectures"
        )
    kernel, bias = variables["params"]["classifier"]["kernel"], variables["params"]["classifier"]["bias"]
    return jnp.concatenate([kernel.T, bias[:, None].astype(kernel.dtype)], axis=1)


def no_cache(*_) -> NoReturn:
    raise ValueError("a model of images does not generate; choose a decoder, as llama")


def expect_pixels(pixels: Array, channels: int, reads: object = None) -> None:
    """Refuses what is no batch of images of a model's channels."""
    if reads is not None:
        raise ValueError("images share no prompt; leave out reads")
    if pixels.ndim != 4 or pixels.shape[-1] != channels:
        raise ValueError(f"pixels have shape {pixels.shape}; [B, H, W, {channels}] is expected, channels last")
