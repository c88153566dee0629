"""Which rows a run sees, and how often: sources put together, and a held-out part that shares no row with the rest.

concat              every source as often as its `epochs` say
interleave_under    shares as the weights say, as many rows as there are until the first source has run out
interleave_over     shares as the weights say, until every source was seen whole; the smaller ones repeat

A mixture is a count for each row. The order is the shuffle's, so shares hold throughout an epoch.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Bool, Int, UInt64

from jaxsft.data.rows import DataError

Mix = Literal["concat", "interleave_under", "interleave_over"]


def held_out(hashes: Sequence[UInt64[np.ndarray, "_"]], fraction: float, seed: int) -> list[Bool[np.ndarray, "_"]]:
    """Chooses a share of all rows by their hashes, so that equal rows are on the same side.

    Args:
      hashes: of each source's rows.
      fraction: of the different rows, 0 to 1.
      seed: another one chooses others.

    Returns:
      for each source, which rows are held out.

    Raises:
      DataError: the fraction is none, or leaves one side empty.

    Example:
      >>> one, two = held_out([np.array([7, 7, 9], np.uint64), np.array([9, 11], np.uint64)], 0.34, 0)
      >>> bool(one[0] == one[1]), bool(one[2] == two[0]), int(one.sum() + two.sum()) in (1, 2)
      (True, True, True)
    """
    if fraction == 0:
        return [np.zeros(len(one), bool) for one in hashes]
    if not 0 < fraction < 1:
        raise DataError(f"data.val_fraction is {fraction}; it must lie between 0 and 1, such as 0.05")
    different = np.unique(np.concatenate(hashes))
    count = round(fraction * len(different))
    if not 0 < count < len(different):
        raise DataError(
            f"data.val_fraction {fraction} of {len(different)} different rows leaves "
            f"{'none to measure on' if not count else 'none to learn from'}; give another fraction"
        )
    chosen = np.zeros(len(different), bool)
    chosen[np.random.default_rng(seed).permutation(len(different))[:count]] = True
    return [chosen[np.searchsorted(different, one)] for one in hashes]


def counts(
    kept: Sequence[Bool[np.ndarray, "_"]],
    mix: Mix,
    *,
    weights: Sequence[float],
    epochs: Sequence[float],
    seed: int,
) -> list[Int[np.ndarray, "_"]]:
    """How often each row of each source comes in one epoch.

    Args:
      kept: for each source, the rows that take part.
      mix: see the module.
      weights: of the sources, for interleave_*.
      epochs: of the sources, for concat.
      seed: chooses the rows of a part.

    Raises:
      DataError: a weight or epochs is not above 0, or one is given that the mixture does not use.

    Example:
      >>> three, six = np.ones(3, bool), np.ones(6, bool)
      >>> [int(c.sum()) for c in counts([three, six], "concat", weights=[1, 1], epochs=[2, 0.5], seed=0)]
      [6, 3]
      >>> [int(c.sum()) for c in counts([three, six], "interleave_under", weights=[1, 1], epochs=[1, 1], seed=0)]
      [3, 3]
      >>> [c.tolist() for c in counts([three, six], "interleave_over", weights=[1, 1], epochs=[1, 1], seed=0)]
      [[2, 2, 2], [1, 1, 1, 1, 1, 1]]
    """
    for name, values in (("weight", weights), ("epochs", epochs)):
        if wrong := [value for value in values if not value > 0]:
            raise DataError(f"{name} of a source is {wrong[0]}; it must be above 0; leave out what is not wanted")
        used = mix == "concat" if name == "epochs" else mix != "concat"
        if not used and any(value != 1 for value in values):
            other = "interleave_under or interleave_over" if name == "weight" else "concat"
            raise DataError(f"a source has {name}, which data.mix {mix} does not use; choose {other}")
    sizes = np.array([int(one.sum()) for one in kept])
    if mix == "concat":
        wanted = np.array(epochs) * sizes
    else:
        share = np.array(weights) / np.sum(weights)
        wanted = share * (min if mix == "interleave_under" else max)(sizes[sizes > 0] / share[sizes > 0])
    draw, found = np.random.default_rng(seed), []
    for rows, size, total in zip(kept, sizes, np.round(wanted).astype(int), strict=True):
        here = np.zeros(len(rows), np.int32)
        if size:
            whole, part = divmod(int(total), int(size))
            here[rows] = whole
            here[draw.permutation(np.flatnonzero(rows))[:part]] += 1
        found.append(here)
    return found
