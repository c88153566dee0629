"""What is held out of a set of images: a share of each class, and all copies of an image on one side."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int, UInt64

from jaxsft.data.rows import DataError


class Split(NamedTuple):
    """Which images are held out, and what the rule could not do."""

    held: Bool[np.ndarray, "N"]
    lone: Int[np.ndarray, "_"]  # classes with a single image, which is learned: nothing of them can be measured


def stratified(labels: Int[np.ndarray, "N"], hashes: UInt64[np.ndarray, "N"], fraction: float, seed: int) -> Split:
    """Holds out a share of each class, to the nearest image, at least one and never all; copies stay together.

    Args:
      labels: the class of each image.
      hashes: of what it shows; equal ones are copies, and count once. Copies of different classes go by the first.
      fraction: of the different images of each class, 0 to 1.
      seed: another one chooses others.

    Raises:
      DataError: the fraction is none; no class has two images.

    Example:
      >>> labels, hashes = np.array([0, 0, 0, 0, 1, 1, 2]), np.array([1, 2, 2, 3, 4, 5, 6], np.uint64)
      >>> held, lone = stratified(labels, hashes, 0.3, 0)
      >>> int(held[:4].sum()) in (1, 2), int(held[4:6].sum()), bool(held[6]), lone.tolist()
      (True, 1, False, [2])
    """
    if not 0 < fraction < 1:
        raise DataError(f"data.val_fraction is {fraction}; it must lie between 0 and 1, such as 0.1")
    _, first, which = np.unique(hashes, return_index=True, return_inverse=True)
    owner = labels[first]  # the class of each different image
    chosen, lone, draw = np.zeros(len(first), bool), [], np.random.default_rng(seed)
    for number in np.unique(labels):
        own = np.flatnonzero(owner == number)
        own = own[np.argsort(first[own])]  # in the order of the data, so that the draw does not hang on the hashes
        if len(own) < 2:
            lone.append(number)
            continue
        count = min(max(round(fraction * len(own)), 1), len(own) - 1)
        chosen[draw.permutation(own)[:count]] = True
    if not chosen.any():
        raise DataError(f"no class has two different images, so data.val_fraction {fraction} can hold none out")
    return Split(chosen[which], np.array(lone, np.int64))


def copies(hashes: UInt64[np.ndarray, "N"]) -> int:
    """How many images are copies of an earlier one.

    Example:
      >>> copies(np.array([1, 2, 1, 1], np.uint64))
      2
    """
    return len(hashes) - len(np.unique(hashes))
