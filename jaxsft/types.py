"""The records that travel between the parts, and the array aliases they are written in."""

from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Bool, Float, Int

from jaxsft.tree import Tree

Key = jax.Array  # a key of jax.random.key
Metrics = dict[str, Array]


class Tokens(NamedTuple):
    """Rows of packed documents, as arrays of one shape.

    Two documents, "a b" (only b learned) and "c d e" (d, e learned), in one row of six:

        tokens     a b c d e .
        mask       0 1 0 1 1 0     is this token learned, predicted from the one before it?
        positions  0 1 0 1 2 0     restart with each document
        segments   1 1 2 2 2 0     0 is padding; no attention between different numbers
    """

    tokens: Int[Array, "B T"]
    mask: Bool[Array, "B T"]
    positions: Int[Array, "B T"]
    segments: Int[Array, "B T"]


class Sums(NamedTuple):
    """What an objective returns: sums and their weight, never means, so that any split of a batch adds up."""

    loss: Float[Array, ""]
    weight: Float[Array, ""]
    metrics: Metrics


class State(NamedTuple):
    """What training changes, and nothing else."""

    step: Int[Array, ""]
    trainable: Tree
    opt_state: Any
    key: Key
