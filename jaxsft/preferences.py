"""What people look at after preferences were learned: figures of held-out pairs with how sure they are, and curves."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int

from jaxsft import report
from jaxsft.report import share

BINS = 10  # of a calibration


class Calibration(NamedTuple):
    """How often a model is right, by how sure it says to be: sigmoid(|margin|), from 1/2 to 1."""

    sure: Float[np.ndarray, "bins"]  # mean of what it says, of each bin; NaN where a bin is empty
    right: Float[np.ndarray, "bins"]  # share of pairs in which it is right
    count: Float[np.ndarray, "bins"]
    error: float  # the expected calibration error: the mean difference of the two, weighed by count


def calibration(margins: Float[np.ndarray, "N"], bins: int = BINS) -> Calibration:
    """Compares a reward model's probabilities with what people chose.

    Args:
      margins: score of the chosen less that of the rejected answer, of held-out pairs.
      bins: of equal width between 1/2 and 1.

    Example:
      >>> found = calibration(np.array([2.0, 2.0, 2.0, -2.0]), bins=2)
      >>> found.count.tolist(), round(found.error, 3)  # it says 88 %, and is right in 75 %
      ([0.0, 4.0], 0.131)

    Source: Guo et al. 2017, arXiv:1706.04599, equation 3.
    """
    margins = np.asarray(margins, np.float64)
    said, hit = 1 / (1 + np.exp(-np.abs(margins))), (margins > 0).astype(float)
    which = np.clip(((said - 0.5) * 2 * bins).astype(int), 0, bins - 1)
    count = np.bincount(which, minlength=bins).astype(float)
    with np.errstate(invalid="ignore", divide="ignore"):
        sure, right = (np.bincount(which, values, bins) / count for values in (said, hit))
    error = np.nansum(np.abs(sure - right) * count) / max(len(margins), 1)
    return Calibration(sure, right, count, float(error))


def lengths(margins: Float[np.ndarray, "N"], longer: Float[np.ndarray, "N"]) -> dict[str, str]:
    """How much of a preference is one for length.

    Args:
      margins: what the model prefers the chosen answers by.
      longer: tokens of the chosen answer less those of the rejected one.

    Example:
      >>> lengths(np.array([1.0, -1.0, 2.0]), np.array([3.0, 2.0, -4.0]))["prefers the longer"]
      '33.3% of 3 (95 %: 6.1% to 79.2%)'
    """
    differ = longer != 0
    margins, longer = margins[differ], longer[differ]
    varies = len(margins) > 1 and np.std(margins) > 0 and np.std(longer) > 0
    together = f"{np.corrcoef(margins, longer)[0, 1]:+.2f}" if varies else "unknown"
    return {
        "the chosen is longer": str(share((longer > 0).astype(float))),
        "prefers the longer": str(share(((margins > 0) == (longer > 0)).astype(float))),
        "margin and length, correlation": together,
    }


def show(margins: Mapping[str, Float[np.ndarray, "N"]], longer: Float[np.ndarray, "N"] | None = None) -> None:
    """Prints what held-out pairs have become.

    Args:
      margins: by what they are differences of, such as "score after": of the chosen and the rejected answer.
      longer: tokens of the chosen answer less those of the rejected one; then the last of the margins is looked at for
        a liking for length.
    """
    rows = [
        (name, str(share((values > 0).astype(float))), f"{values.mean():+.4f}", f"{values.std():.4f}")
        for name, values in margins.items()
    ]
    report.table("held-out pairs", ("by", "chosen is ahead in", "margin", "standard deviation"), rows, lines=False)
    if longer is not None:
        report.summary("answers of different length", lengths(list(margins.values())[-1], longer))


def plot_calibration(margins: Float[np.ndarray, "N"], png: Path) -> None:
    """Draws how often a reward model is right by how sure it is, and how its margins lie."""
    if jax.process_index():
        return
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    found = calibration(margins)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.5), dpi=120)
    left.plot([0.5, 1], [0.5, 1], color="black", linestyle="--", linewidth=1, label="calibrated")
    left.plot(found.sure, found.right, "o-", color="tab:blue", label=f"held-out pairs, error {found.error:.3f}")
    left.set(xlabel="probability that the model gives", ylabel="share in which it is right", xlim=(0.5, 1), ylim=(0, 1))
    left.legend()
    right.hist(margins, bins=min(40, max(10, len(margins) // 10)), color="tab:blue")
    right.axvline(0, color="black", linewidth=1)
    right.axvline(float(np.mean(margins)), color="tab:orange", label=f"mean {np.mean(margins):+.3f}")
    right.set(xlabel="score of the chosen less that of the rejected answer", ylabel="pairs")
    right.legend()
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(png)
    plt.close(figure)


def compare(shown: Sequence[Any], row: Int[np.ndarray, "N"], before: np.ndarray, after: np.ndarray, title: str) -> None:
    """Prints some pairs with a number of each before and after.

    Args:
      shown: from `data.comparisons`.
      row: the numbers of the pairs that were measured, in order.
      before, after: of each of those.
      title: what the numbers are.
    """
    lines = []
    for one in shown:
        at = int(np.searchsorted(row, one.pair))
        told = (f"{values[at]:+.3f}" for values in (before, after))
        lines.append((one.question.text, one.question.answer, one.rejected, *told))
    report.table(title, ("prompt", "chosen", "rejected", "before", "after"), lines)
