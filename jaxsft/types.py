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


class Pairs(NamedTuple):
    """Two answers to each prompt, a row an answer; both sides begin with the prompt and learn the answer alone."""

    chosen: Tokens
    rejected: Tokens
    margin: Float[Array, "B"]  # how much better chosen is, 0 where the data does not say


class Judged(NamedTuple):
    """An answer a row, and whether it is wanted."""

    answers: Tokens
    label: Bool[Array, "B"]


class Prompts(NamedTuple):
    """Prompts to answer, on the left; rows that only fill a batch have length 0 and row -1."""

    tokens: Int[Array, "B T"]
    lengths: Int[Array, "B"]
    rows: Int[Array, "B"]  # of the data, to look up what else the row says


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
