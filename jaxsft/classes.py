"""What people look at after a classifier has learned: how often it is right, class by class, and how sure it was."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int

from jaxsft import report
from jaxsft.report import Share, share

BINS = 15  # of a calibration
WRITTEN_OUT = 30  # classes up to which a confusion is drawn with its numbers


class Calibration(NamedTuple):
    """How often a classifier is right, by how sure it says to be."""

    sure: Float[np.ndarray, "bins"]  # mean probability of each bin; NaN where it is empty
    right: Float[np.ndarray, "bins"]
    count: Float[np.ndarray, "bins"]
    error: float  # the expected calibration error: the mean difference of the two, weighed by count


class Figures(NamedTuple):
    """How good the scores of some images are."""

    classes: tuple[str, ...]
    accuracy: Share
    top5: Share
    loss: float  # nats an image
    confusion: Int[np.ndarray, "K K"]  # row: the class that is right, column: the one with the highest score
    precision: Float[np.ndarray, "K"]  # of the images that were called so, those that are; NaN where none was
    recall: Float[np.ndarray, "K"]  # of the images that are so, those that were called so; NaN where none is
    f1: Float[np.ndarray, "K"]
    calibration: Calibration

    @property
    def macro_f1(self) -> float:
        """The mean of F1 over the classes that have images."""
        return float(np.mean(self.f1[self.confusion.sum(1) > 0]))


def probabilities(scores: Float[np.ndarray, "N K"]) -> Float[np.ndarray, "N K"]:
    """The softmax, in float64.

    Example:
      >>> probabilities(np.array([[0.0, 0.0]])).tolist()
      [[0.5, 0.5]]
    """
    scores = np.asarray(scores, np.float64)
    raised = np.exp(scores - scores.max(-1, keepdims=True))
    return raised / raised.sum(-1, keepdims=True)


def measure(scores: Float[np.ndarray, "N K"], labels: Int[np.ndarray, "N"], classes: Sequence[str]) -> Figures:
    """Compares scores with the classes that are right.

    Args:
      scores: before the softmax.
      labels: numbers of classes.
      classes: their names.

    Example:
      >>> found = measure(np.array([[2.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), np.array([0, 1, 1]), ("cat", "dog"))
      >>> found.confusion.tolist(), found.precision.tolist(), found.recall.tolist()
      ([[1, 0], [1, 1]], [0.5, 1.0], [1.0, 0.5])

    Source: F1, van Rijsbergen 1979, Information Retrieval, chapter 7.
    """
    count, chances = len(classes), probabilities(scores)
    called = chances.argmax(-1)
    confusion = np.zeros((count, count), np.int64)
    np.add.at(confusion, (labels, called), 1)
    hits, right = np.diag(confusion), chances[np.arange(len(labels)), labels]
    with np.errstate(invalid="ignore"):
        precision, recall = hits / confusion.sum(0), hits / confusion.sum(1)
        f1 = 2 * hits / (confusion.sum(0) + confusion.sum(1))
    above = (chances > right[:, None]).sum(-1)  # classes that are thought likelier than the right one
    return Figures(
        tuple(classes),
        share((called == labels).astype(float)),
        share((above < 5).astype(float)),
        float(-np.log(np.maximum(right, 1e-300)).mean()),
        confusion,
        precision,
        recall,
        np.nan_to_num(f1),
        calibration(chances.max(-1), called == labels),
    )


def calibration(sure: Float[np.ndarray, "N"], right: Int[np.ndarray, "N"], bins: int = BINS) -> Calibration:
    """Compares how sure a classifier is with how often it is right.

    Args:
      sure: the probability of the class it chose.
      right: whether that is the right one.
      bins: of equal width between 0 and 1.

    Example:
      >>> found = calibration(np.array([0.9, 0.9, 0.9, 0.9]), np.array([1, 1, 1, 0]), bins=2)
      >>> found.count.tolist(), round(found.error, 3)
      ([0.0, 4.0], 0.15)

    Source: Guo et al. 2017, arXiv:1706.04599, equation 3.
    """
    which = np.clip((np.asarray(sure) * bins).astype(int), 0, bins - 1)
    count = np.bincount(which, minlength=bins).astype(float)
    with np.errstate(invalid="ignore"):
        mean, share = (np.bincount(which, np.asarray(x, float), bins) / count for x in (sure, right))
    error = np.nansum(np.abs(mean - share) * count) / max(len(which), 1)
    return Calibration(mean, share, count, float(error))


def show(figures: Figures, before: Figures | None = None) -> None:
    """Prints what held-out images have become, and each class.

    Args:
      figures: after training.
      before: training.
    """
    was = lambda told: "" if before is None else f"{told(before)} -> "
    percent = lambda found: f"{found.value:.1%}"
    lines = {
        "accuracy": was(lambda f: percent(f.accuracy)) + str(figures.accuracy),
        "among the first five": was(lambda f: percent(f.top5)) + str(figures.top5),
        "loss": was(lambda f: f"{f.loss:.4f}") + f"{figures.loss:.4f} nats an image",
        "mean F1 of classes": was(lambda f: f"{f.macro_f1:.3f}") + f"{figures.macro_f1:.3f}",
        "calibration error": was(lambda f: f"{f.calibration.error:.3f}") + f"{figures.calibration.error:.3f}",
    }
    if len(figures.classes) <= 5:
        del lines["among the first five"]
    report.summary("held-out images", lines)
    order = np.argsort(figures.f1, kind="stable")
    rows = [_row(figures, number) for number in (order[: report.ROWS] if len(order) > report.ROWS else sorted(order))]
    title = "classes" + ", the worst" * (len(order) > report.ROWS)
    report.table(title, ("class", "images", "precision", "recall", "F1", "taken for"), rows, lines=False)


def _row(figures: Figures, number: int) -> tuple[str, ...]:
    part = lambda value: "-" if np.isnan(value) else f"{value:.1%}"
    wrong = figures.confusion[number].copy()
    wrong[number] = 0
    other = f"{figures.classes[wrong.argmax()]} ({wrong.max()})" if wrong.max() else ""
    scores = (figures.precision[number], figures.recall[number])
    count = f"{figures.confusion[number].sum():,}"
    return figures.classes[number], count, *map(part, scores), f"{figures.f1[number]:.3f}", other


def write(figures: Figures, file: Path) -> None:
    """Writes the figures as JSON."""
    number = lambda value: None if np.isnan(value) else round(float(value), 6)
    each = zip(figures.classes, figures.precision, figures.recall, figures.f1, figures.confusion.sum(1), strict=True)
    found: dict[str, Any] = {
        "images": int(figures.confusion.sum()),
        "accuracy": number(figures.accuracy.value),
        "accuracy_95": [number(figures.accuracy.low), number(figures.accuracy.high)],
        "top5": number(figures.top5.value),
        "loss": number(figures.loss),
        "macro_f1": number(figures.macro_f1),
        "calibration_error": number(figures.calibration.error),
        "classes": [
            {"label": name, "images": int(n), "precision": number(p), "recall": number(r), "f1": number(f)}
            for name, p, r, f, n in each
        ],
        "confusion": figures.confusion.tolist(),
    }
    file.write_text(json.dumps(found, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def plot_confusion(figures: Figures, png: Path) -> None:
    """Draws which class is taken for which."""
    if jax.process_index():
        return
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    count = len(figures.classes)
    shares = figures.confusion / np.maximum(figures.confusion.sum(1, keepdims=True), 1)
    side = min(4 + 0.35 * count, 16)
    figure, axis = plt.subplots(figsize=(side + 1, side), dpi=110)
    image = axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, label="share of the images of a class")
    axis.set(xlabel="class that the model says", ylabel="class that is right")
    if count <= WRITTEN_OUT:
        names = [name if len(name) <= 20 else name[:19] + "…" for name in map(_plain, figures.classes)]
        axis.set_xticks(range(count), names, rotation=60, ha="right")
        axis.set_yticks(range(count), names)
        for (row, column), n in np.ndenumerate(figures.confusion):
            if n:
                axis.text(column, row, n, ha="center", va="center", color="white" if shares[row, column] > 0.5 else "k")
    figure.tight_layout()
    figure.savefig(png)
    plt.close(figure)


def _plain(name: str) -> str:
    """A name that matplotlib draws as it is: no mathematics, no characters that its font lacks."""
    return name.replace("$", r"\$").encode("latin-1", "replace").decode("latin-1")


def plot_calibration(figures: Figures, png: Path) -> None:
    """Draws how often a classifier is right by how sure it is, and how often it is how sure."""
    if jax.process_index():
        return
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    found = figures.calibration
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.5), dpi=120)
    left.plot([0, 1], [0, 1], color="black", linestyle="--", linewidth=1, label="calibrated")
    left.plot(found.sure, found.right, "o-", color="tab:blue", label=f"held-out images, error {found.error:.3f}")
    left.set(xlabel="probability that the model gives", ylabel="share in which it is right", xlim=(0, 1), ylim=(0, 1))
    left.legend()
    edges = np.arange(len(found.count)) / len(found.count)
    right.bar(edges, found.count, width=1 / len(found.count), align="edge", color="tab:blue")
    right.set(xlabel="probability that the model gives", ylabel="images", xlim=(0, 1))
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(png)
    plt.close(figure)


def said(
    scores: Float[np.ndarray, "N K"], classes: Sequence[str], images: Sequence[str], labels: Sequence[str] | None = None
) -> list[dict[str, Any]]:
    """What a model says of images, a record each, for people and for `predictions.jsonl`.

    Example:
      >>> said(np.array([[0.0, 2.0]]), ("cat", "dog"), ["a.jpg"], ["cat"])[0]
      {'image': 'a.jpg', 'label': 'cat', 'prediction': 'dog', 'probability': 0.880797,
       'top': {'dog': 0.880797, 'cat': 0.119203}}
    """
    chances, rows = probabilities(scores), []
    for number, image in enumerate(images):
        first = np.argsort(-chances[number], kind="stable")[:5]
        top = {classes[i]: round(float(chances[number, i]), 6) for i in first}
        own = {} if labels is None else {"label": labels[number]}
        name = classes[first[0]]
        rows.append({"image": image, **own, "prediction": name, "probability": top[name], "top": top})
    return rows


def write_rows(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """Writes records, one a line."""
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
