"""What people look at: the loss curve, sample answers before and after, and the table at the end."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from jaxsft.run import METRICS, read_metrics


def plot_loss(metrics: Path, png: Path) -> None:
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
    axis.set(xlabel="step", ylabel="loss (nats per learned token)", ylim=(0, None))
    axis.grid(alpha=0.3)
    axis.legend()
    figure.tight_layout()
    figure.savefig(png)
    plt.close(figure)


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


LONGEST = 120  # characters of a cell


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table; text that looks like markup is shown as it is, a long text is cut."""
    if jax.process_index():
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    shown = Table(title=title, title_justify="left", show_header=any(columns), show_lines=len(columns) > 2)
    for column in columns:
        shown.add_column(column, overflow="fold")  # Chinese has no spaces to break at
    for row in rows:
        cells = (" ".join(cell.split()) for cell in row)
        shown.add_row(*(Text(cell if len(cell) <= LONGEST else cell[: LONGEST - 1] + "…") for cell in cells))
    Console().print(shown)


def summary(title: str, rows: Mapping[str, object]) -> None:
    """Prints names and values."""
    table(title, ("", ""), [(name, str(value)) for name, value in rows.items()])


def finish(folder: Path, samples: Sequence[tuple[str, str, str, str]], written: Mapping[str, Path]) -> None:
    """Shows a run's end: answers before and after, the held-out loss before and after, and what lies where.

    Args:
      folder: of the run, with metrics.jsonl.
      samples: (question, wanted answer, answer before, answer after), none or some.
      written: name -> path of what the run wrote beside its metrics.
    """
    if jax.process_index():
        return
    metrics = read_metrics(folder / METRICS)
    plot_loss(folder / METRICS, folder / "loss.png")
    if samples:
        table("held-out questions", ("question", "wanted", "before", "after"), samples)
    held = [row["eval_loss"] for row in metrics if "eval_loss" in row]
    losses = [row["loss"] for row in metrics if "loss" in row]
    figures = {"steps": max((row["step"] for row in metrics), default=0)}
    figures |= {"loss, first and last step": f"{losses[0]:.4f} -> {losses[-1]:.4f}"} if losses else {}
    figures |= {"held-out loss, before and after": f"{held[0]:.4f} -> {held[-1]:.4f}"} if held else {}
    files = {
        "metrics": folder / METRICS,
        "loss curve": folder / "loss.png",
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
