"""The records that travel between the parts, and the array aliases they are written in."""

from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Bool, Float, Int, UInt8, UInt32

from jaxsft.tree import Tree

Key = jax.Array  # a key of jax.random.key
Metrics = dict[str, Any]  # of scalars on the device


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
    """Rows of packed pairs, two answers to a prompt each; the prompt stands there once and both answers read it.

    The prompt "a b c" with the answers "d e" and "f", in one row of ten:

        tokens     a b c d e c f . . .     the prompt but for its last token, then chosen, then rejected;
        mask       0 0 0 1 1 0 1 0 0 0     an answer begins with the prompt's last token, which predicts its first
        positions  0 1 2 3 4 2 3 0 0 0     as in the two documents "a b c d e" and "a b c f"
        segments   1 1 2 2 2 3 3 0 0 0     3k+1, 3k+2, 3k+3 for the row's pair k = 0, 1, ...; 0 is padding
        reads      1 1 1 1 1 1 1 0 0 0     the segment that a token sees beside its own, see `reads`

    Where a prompt may not be shared, both documents stand there whole, in 3k+2 and 3k+3, and there is no 3k+1. A row
    has place for K pairs, the most of any row of the data.
    """

    tokens: Int[Array, "B T"]
    mask: Bool[Array, "B T"]
    positions: Int[Array, "B T"]
    segments: Int[Array, "B T"]
    value: Float[Array, "B K"]  # the margin, 0 where the data gives none; of judged answers the label, 1 or 0
    exists: Bool[Array, "B K"]  # is there a pair k?
    row: Int[Array, "B K"]  # the pair's number in the data, to look up what else is known of it; -1 where there is none
    reference: Float[Array, "B K 2"]  # log-probabilities of both under the reference, 0 unless they were precomputed


def reads(segments: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """The segment that each token of `Pairs` sees beside its own: that of its prompt; 0 for padding.

    Example:
      >>> import numpy as np
      >>> reads(np.array([[1, 1, 2, 3, 4, 5, 6, 0]])).tolist()
      [[1, 1, 1, 1, 4, 4, 4, 0]]
    """
    return (3 * ((segments - 1) // 3) + 1) * (segments > 0)


class Prompts(NamedTuple):
    """Prompts to answer, on the left; rows that only fill a batch have length 0 and row -1."""

    tokens: Int[Array, "B T"]
    lengths: Int[Array, "B"]
    rows: Int[Array, "B"]  # of the data, to look up what else the row says


class Rollouts(NamedTuple):
    """Rows of packed episodes, prompts and answers that the policy drew, with all that is known of each drawn token.

    tokens to segments are those of `Tokens`; the mask has the tokens that were drawn and are learned from. What is
    known of a token stands where it is predicted, one place to its left, as `losses.shift` has it.
    """

    tokens: Int[Array, "B T"]
    mask: Bool[Array, "B T"]
    positions: Int[Array, "B T"]
    segments: Int[Array, "B T"]
    old: Float[Array, "B T"]  # log-probability under the policy that drew it
    reference: Float[Array, "B T"]  # the same under the reference; 0 where the loss has none
    advantage: Float[Array, "B T"]
    value: Float[Array, "B T"]  # what the critic expected; 0 without one
    returns: Float[Array, "B T"]  # what came
    fresh: Bool[Array, "B 1"]  # has nothing been learned since `old`? The ratio of the two is then 1 exactly


class Images(NamedTuple):
    """Pictures with their classes.

    Before augmentation pixels are 8-bit and `targets` None. Augmentation (`augment.apply`) makes them float32, as the
    model reads them, and says what each is to be called: one class, or shares of two where pictures were mixed.
    """

    pixels: UInt8[Array, "B H W C"] | Float[Array, "B H W C"]
    label: Int[Array, "B 1"]
    row: Int[Array, "B 1"]  # its number in the data; -1 where a row only fills up a batch
    turn: UInt32[Array, "B 1"]  # how many rows of the stream came before: what is random of a row hangs on it
    targets: Float[Array, "B K"] | None = None


class Contrasts(NamedTuple):
    """Questions, each with the passages it is to be told apart by: first the right one, then hard negatives.

    Tokens are at the left of their rows. A row that only fills the batch has texts of -1 and sizes of 0.
    """

    queries: Int[Array, "B T"]
    query_sizes: Int[Array, "B 1"]
    passages: Int[Array, "B P S"]
    passage_sizes: Int[Array, "B P"]
    texts: Int[Array, "B P"]  # the number of each passage's text, to tell that two are the same; -1 for none


def by_token(record: type) -> frozenset[str]:
    """The fields of a batch that hold something for each token, [B, T]; the others are for whole rows.

    Example:
      >>> sorted(by_token(Tokens)), sorted(by_token(Images))
      (['mask', 'positions', 'segments', 'tokens'], [])
    """
    kinds = getattr(record, "__annotations__", {})
    return frozenset(name for name, kind in kinds.items() if getattr(kind, "dim_str", "") == "B T")


class Mean(NamedTuple):
    """A metric with a weight of its own: a sum, and over how many."""

    total: Float[Array, ""]
    weight: Float[Array, ""]


class Sums(NamedTuple):
    """What an objective returns: sums and their weight, never means, so that any split of a batch adds up.

    A metric is a sum over what the loss is a sum over, or a `Mean`.
    """

    loss: Float[Array, ""]
    weight: Float[Array, ""]
    metrics: Metrics


class State(NamedTuple):
    """What training changes, and nothing else."""

    step: Int[Array, ""]
    trainable: Tree
    opt_state: Any
    key: Key
