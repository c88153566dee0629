"""What people look at: the loss curve, sample answers before and after, and the table at the end."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from jaxsft.run import METRICS, read_metrics


def plot_loss(metrics: Path, png: Path, unit: str = "nats per learned token") -> None:
    """Draws the loss of `metrics.jsonl`: every logged step, their running mean, the held-out losses."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    rows = read_metrics(metrics)
    train = np.array([(r["step"], r["loss"]) for r in rows if "loss" in r]).reshape(-1, 2)
    held = np.array([(r["step"], r["eval_loss"]) for r in rows if "eval_loss" in r]).reshape(-1, 2)
    figure, axis = plt.subplots(figsize=(8, 4.5), dpi=120)
    axis.plot(*train.T, color="tab:blue", alpha=0.3, linewidth=1, label="loss of each step")
    if len(train) > 20:
        axis.plot(train[:, 0], running_mean(train[:, 1]), color="tab:blue", linewidth=2, label="running mean")
    if len(held):
        axis.plot(*held.T, "o-", color="tab:orange", label="held-out loss")
    axis.set(xlabel="step", ylabel=f"loss ({unit})")
    if all(values.min(initial=0.0) >= 0 for values in (train[:, 1], held[:, 1])):  # some losses of pairs have no floor
        axis.set_ylim(0, None)
    axis.grid(alpha=0.3)
    axis.legend()
    figure.tight_layout()
    figure.savefig(png)
    plt.close(figure)


OTHERWISE = {"step", "loss", "learning_rate", "tokens_per_second", "trained_tokens", "images_per_second"}
OTHERWISE |= {"trained_images"}  # told elsewhere, or of no shape


def plot_metrics(metrics: Path, png: Path) -> bool:
    """Draws what `metrics.jsonl` has beside the loss: each metric of the steps, and of held-out rows.

    Returns:
      whether there was anything to draw.
    """
    rows = read_metrics(metrics)
    names = [name for name in dict.fromkeys(name for row in rows for name in row) if name not in OTHERWISE]
    names = [name for name in names if not name.startswith("eval_")]
    if not names:
        return False
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    wide = min(3, len(names))
    high = -(-len(names) // wide)
    figure, axes = plt.subplots(high, wide, figsize=(4 * wide, 2.6 * high), dpi=110, squeeze=False)
    for axis, name in zip(axes.flat, names, strict=False):
        train = np.array([(row["step"], row[name]) for row in rows if name in row]).reshape(-1, 2)
        held = np.array([(r["step"], r[f"eval_{name}"]) for r in rows if f"eval_{name}" in r]).reshape(-1, 2)
        axis.plot(*train.T, color="tab:blue", alpha=0.3, linewidth=1)
        if len(train) > 20:
            axis.plot(train[:, 0], running_mean(train[:, 1]), color="tab:blue", linewidth=1.5)
        axis.plot(*held.T, "o-", color="tab:orange", markersize=3)
        axis.set_title(name.replace("_", " "), fontsize=9)
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(names) :]:
        axis.remove()
    figure.tight_layout()
    figure.savefig(png)
    plt.close(figure)
    return True


def running_mean(values: np.ndarray, memory: float = 0.9) -> np.ndarray:
    """An exponential running mean, corrected for its start.

    Example:
      >>> running_mean(np.array([2.0, 2.0, 2.0]))
      array([2., 2., 2.])
    """
    total = weight = 0.0
    out = []
    for value in values:
        total, weight = memory * total + (1 - memory) * value, memory * weight + (1 - memory)
        out.append(total / weight)
    return np.array(out)


class Share(NamedTuple):
    """A share of n, and the interval that holds the true one with 95 % confidence."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.value:.1%} of {self.n:,} (95 %: {self.low:.1%} to {self.high:.1%})"


def share(hits: Float[np.ndarray, "N"]) -> Share:
    """The mean of zeros and ones, with Wilson's interval.

    Example:
      >>> str(share(np.array([1.0] * 60 + [0.0] * 40)))
      '60.0% of 100 (95 %: 50.2% to 69.1%)'

    Source: Wilson 1927, doi:10.1080/01621459.1927.10502953.
    """
    n, z = len(hits), 1.959964
    if not n:
        return Share(float("nan"), 0.0, 1.0, 0)
    p = float(np.mean(hits))
    middle, half = p + z * z / (2 * n), z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return Share(p, max(0.0, float((middle - half) / scale)), min(1.0, float((middle + half) / scale)), n)


LONGEST = 120  # characters of a cell
ROWS = 30  # of a table that could be long


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, lines: bool | None = None) -> None:
    """Prints a table; text that looks like markup is shown as it is, a long text is cut.

    Args:
      title: above it.
      columns: their names; all "" for none.
      rows: of cells.
      lines: between the rows; by default where there are more than two columns.
    """
    if jax.process_index():
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    lines = len(columns) > 2 if lines is None else lines
    shown = Table(title=title, title_justify="left", show_header=any(columns), show_lines=lines)
    for column in columns:
        shown.add_column(column, overflow="fold")  # Chinese has no spaces to break at
    for row in rows:
        cells = (" ".join(cell.split()) for cell in row)
        shown.add_row(*(Text(cell if len(cell) <= LONGEST else cell[: LONGEST - 1] + "…") for cell in cells))
    Console().print(shown)


def summary(title: str, rows: Mapping[str, object]) -> None:
    """Prints names and values."""
    table(title, ("", ""), [(name, str(value)) for name, value in rows.items()])


def finish(
    folder: Path,
    samples: Sequence[tuple[str, str, str, str]],
    written: Mapping[str, Path],
    *,
    unit: str = "nats per learned token",
    measure: str = "loss",
) -> None:
    """Shows a run's end: answers before and after, the held-out loss before and after, and what lies where.

    Args:
      folder: of the run, with metrics.jsonl.
      samples: (question, wanted answer, answer before, answer after), none or some.
      written: name -> path of what the run wrote beside its metrics.
      unit: of the loss.
      measure: what is told of held-out rows, before and after.
    """
    if jax.process_index():
        return
    metrics = read_metrics(folder / METRICS)
    plot_loss(folder / METRICS, folder / "loss.png", unit)
    others = plot_metrics(folder / METRICS, folder / "metrics.png")
    if samples:
        table("held-out questions", ("question", "wanted", "before", "after"), samples)
    held = [row[f"eval_{measure}"] for row in metrics if f"eval_{measure}" in row]
    losses = [row["loss"] for row in metrics if "loss" in row]
    figures = {"steps": max((row["step"] for row in metrics), default=0)}
    figures |= {"loss, first and last step": f"{losses[0]:.4f} -> {losses[-1]:.4f}"} if losses else {}
    figures |= {f"held-out {measure}, before and after": f"{held[0]:.4f} -> {held[-1]:.4f}"} if held else {}
    files = {
        "metrics": folder / METRICS,
        "loss curve": folder / "loss.png",
        **({"other curves": folder / "metrics.png"} if others else {}),
        "checkpoints": folder / "checkpoints",
        **written,
    }
    summary("result", figures | {name: f"{path} ({size(path)})" for name, path in files.items()})


def size(path: Path) -> str:
    """The bytes of a file or folder, for people.

    Example:
      >>> size(Path("no such file"))
      '0.00 MB'
    """
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return f"{sum(p.stat().st_size for p in files) / 1e6:.2f} MB"


def tokens(title: str, pieces: Sequence[str], learned: Sequence[bool]) -> None:
    """Prints the tokens of a document, the learned ones coloured; without colours they stand in ⟦ ⟧.

    Args:
      title: a line above.
      pieces: the text of each token.
      learned: whether it is learned.
    """
    if jax.process_index():
        return
    from rich.console import Console
    from rich.text import Text

    console, line = Console(), Text()
    for i, (piece, learns) in enumerate(zip(pieces, learned, strict=True)):
        begins, ends = not (i and learned[i - 1]), not (i + 1 < len(pieces) and learned[i + 1])
        visible = piece.replace("\n", "↵\n")
        if learns and not console.is_terminal:
            visible = "⟦" * begins + visible + "⟧" * ends
        shade = ("black on green", "black on bright_green")[i % 2] if learns else ("", "dim")[i % 2]
        line.append(visible, shade if console.is_terminal else "")
    console.print(Text(title, "bold"))
    console.print(line, soft_wrap=True)
    console.print()


BARS = 12  # of a histogram


def bins(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Counts lengths in at most `BARS` bins of a round width.

    Returns:
      (counts, edges).

    Example:
      >>> bins(np.array([1, 2, 3, 20, 25]))
      (array([2, 1, 0, 0, 0, 0, 1, 0, 1]), array([ 0,  3,  6,  9, 12, 15, 18, 21, 24, 27]))
    """
    width = max(1, -(-(int(lengths.max()) + 1) // BARS))
    scale = 10 ** (len(str(width)) - 1)
    width = -(-width // scale) * scale
    return np.histogram(lengths, np.arange(0, int(lengths.max()) + width + 1, width))


def histogram(title: str, lengths: np.ndarray) -> None:
    """Prints how many lengths fall where."""
    counts, ends = bins(lengths)
    most = max(int(counts.max()), 1)
    rows = [
        (f"{first:,} - {last - 1:,}", f"{count:,}", "█" * round(40 * count / most) or ("▏" if count else ""))
        for count, first, last in zip(counts.tolist(), ends[:-1].tolist(), ends[1:].tolist(), strict=True)
    ]
    table(title, ("tokens", "documents", ""), rows, lines=False)


def plot_lengths(lengths: np.ndarray, max_length: int, png: Path) -> None:
    """Draws how long documents are, with the length that they are cut to."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 4.5), dpi=120)
    axis.hist(lengths, bins=min(60, max(10, int(lengths.max()) // 8)), color="tab:blue")
    axis.axvline(float(np.mean(lengths)), color="tab:orange", label=f"mean {np.mean(lengths):,.0f}")
    if lengths.max() > max_length / 2:
        axis.axvline(max_length, color="black", linestyle="--", label=f"data.max_length {max_length:,}")
    axis.set(xlabel="tokens of a document", ylabel="documents", xlim=(0, None))
    axis.grid(alpha=0.3)
    axis.legend()
    figure.tight_layout()
    figure.savefig(png)
    plt.close(figure)
