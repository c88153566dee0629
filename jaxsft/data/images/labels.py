"""Classes by number: which class is which column of the scores, fixed once and kept with the model.

    labels in the data      roses daisy tulips daisy        10 9 9 2
    sorted                  daisy roses tulips              2 9 10       whole numbers by their value

The names go into config.json, as `id2label` and `label2id`, and into the run's folder, so that a continuation and a
prediction years later mean the same by column 2.
"""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from jaxsft.data.rows import DataError

FILE = "labels.json"  # in a run's folder


def names(labels: Iterable[str]) -> tuple[str, ...]:
    """The different labels in order: of text, or by value where all are whole numbers.

    Example:
      >>> names(["b", "a", "b"]), names(["10", "9", "-1"])
      (('a', 'b'), ('-1', '9', '10'))
    """
    found = set(labels)
    numbers = all(re.fullmatch(r"-?\d+", label) for label in found)
    return tuple(sorted(found, key=lambda label: (int(label), label) if numbers else (0, label)))


def choose(found: Iterable[str], known: Sequence[str] = ()) -> tuple[str, ...]:
    """The classes of a run: those of the checkpoint, in its order, if they are the same; else those of the data.

    Raises:
      DataError: there is only one class.

    Example:
      >>> choose(["cat", "dog"], ["dog", "cat"]), choose(["cat", "dog"], ["tench", "goldfish"])
      (('dog', 'cat'), ('cat', 'dog'))
    """
    own = names(found)
    if len(own) < 2:
        raise DataError(f"all images have the label {own[0] if own else '(none)'!r}; a classifier needs two or more")
    return tuple(known) if set(own) == set(known) else own


def save(folder: Path, classes: Sequence[str]) -> None:
    """Writes the classes of a run."""
    (folder / FILE).write_text(json.dumps(list(classes), ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def read(folder: Path) -> tuple[str, ...] | None:
    """The classes that a run began with, or None.

    Example:
      >>> read(Path("no such folder")) is None
      True
    """
    file = folder / FILE
    return tuple(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else None


def balanced(labels: Int[np.ndarray, "N"], classes: int) -> Float[np.ndarray, "C"]:
    """A weight for each class, N / (C n), so that each class weighs as much as another and the mean over images is 1.

    Example:
      >>> balanced(np.array([0, 0, 0, 1]), 2).tolist()[1]
      2.0

    Source: King and Zeng 2001, doi:10.1093/oxfordjournals.pan.a004868, section 4; "balanced" of scikit-learn.
    """
    return (len(labels) / (classes * np.maximum(np.bincount(labels, minlength=classes), 1))).astype(np.float32)
