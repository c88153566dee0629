"""A comparison to look at: a plot, and one page of HTML that needs no other file."""

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxsft.rag.compare import ARMS, CHANGED, GONE, KEPT, MEASURES, NEW, Figure, Round, fates, figure, scores
from jaxsft.rag.verdict import MEASURE, Finding

STYLE = """body { font: 15px/1.5 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 1em 0 } th, td { border-bottom: 1px solid #ddd; padding: .3em .8em; text-align: left }
td { font-variant-numeric: tabular-nums } .advice { border-left: 4px solid #1f77b4; padding: .5em 1em; background: #f4f8fb }
img { max-width: 100% } .right { color: #2a7a2a } .wrong { color: #a33 }"""  # noqa: E501


class Table(NamedTuple):
    """A title, the names of columns, and rows of cells."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def arms(asked: Round) -> list[str]:
    """The ways that were measured, in their order."""
    return [arm for arm in ARMS if arm in asked.replies]


def figures(asked: Round, seconds: Mapping[str, float]) -> Table:
    """Each way with all measures, and the median time of an answer.

    Args:
      asked: the round.
      seconds: of an answer of each way, where that was measured.
    """
    rows = []
    for arm in arms(asked):
        cells = [figure(scores(asked, arm, measure)) for measure in MEASURES]
        time = f"{seconds[arm] * 1000:,.0f} ms" if arm in seconds else "-"
        rows.append((arm, *("-" if cell is None else str(cell) for cell in cells), time))
    return Table(f"{asked.name}: {len(asked.questions)} questions", ("", *MEASURES, "median time"), rows)


def by_fate(before: Round, after: Round) -> Table:
    """Each way after the change, by what became of a question's answer."""
    fate = np.array(fates(before.questions, after.questions))
    kinds = [kind for kind in (KEPT, CHANGED, GONE, NEW) if (fate == kind).any()]
    rows = []
    for arm in arms(after):
        values = scores(after, arm, MEASURE)
        rows.append((arm, *(str(figure(values[fate == kind])) for kind in kinds)))
    columns = ("", *(f"{kind} ({int((fate == kind).sum())})" for kind in kinds))
    return Table(f"{after.name}: {MEASURE}, by what became of the answer", columns, rows)


def plot(rounds: Sequence[Round], png: Path) -> None:
    """Draws a bar for each way and round, with its interval."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    names = arms(rounds[0])
    figure_, axis = plt.subplots(figsize=(8, 4), dpi=120)
    wide = 0.8 / len(rounds)
    for number, asked in enumerate(rounds):
        found = [figure(scores(asked, arm, MEASURE)) or Figure(0.0, 0.0, 0.0) for arm in names]
        means = np.array([one.mean for one in found])
        ends = np.array([(one.mean - one.low, one.high - one.mean) for one in found]).T
        places = np.arange(len(names)) + (number - (len(rounds) - 1) / 2) * wide
        axis.bar(places, means, wide * 0.95, yerr=ends, capsize=3, label=asked.name)
    axis.set_xticks(np.arange(len(names)), names)
    axis.set(ylabel=f"{MEASURE}, with 95% intervals", ylim=(0, 1.05))
    axis.grid(alpha=0.3, axis="y")
    axis.legend()
    figure_.tight_layout()
    figure_.savefig(png)
    plt.close(figure_)


def page(
    advice: str, findings: Sequence[Finding], tables: Sequence[Table], png: Path, about: Mapping[str, str], notes: str
) -> str:
    """The report: what to do, why, and all that it stands on.

    Args:
      advice: from `verdict.recommend`.
      findings: from `verdict.findings`.
      tables: figures, and answers to read.
      png: of `plot`, which is put into the page.
      about: what was compared, name -> value.
      notes: how the figures were made.
    """
    picture = base64.b64encode(png.read_bytes()).decode()
    marks = {True: '<span class="right">yes</span>', False: '<span class="wrong">no</span>'}
    points = "".join(
        f"<tr><td>{marks[one.holds]}</td><td>{escape(one.claim)}</td><td>{escape(one.evidence)}</td></tr>"
        for one in findings
    )
    body = f"""<h1>Passages, tuning, or both?</h1>
<p class="advice">{escape(advice)}</p>
<h2>Why</h2><table><tr><th></th><th>finding</th><th>evidence</th></tr>{points}</table>
<p><img alt="{escape(MEASURE)} of each way" src="data:image/png;base64,{picture}"></p>
{"".join(map(_table, tables))}
<h2>What was compared</h2>{_table(Table("", ("", ""), list(about.items())))}
<p>{escape(notes)}</p>"""
    head = f'<meta charset="utf-8"><title>Passages, tuning, or both?</title><style>{STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n{body}\n</body></html>\n'


def _table(table: Table) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in table.columns)
    rows = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in table.rows)
    title = f"<h2>{escape(table.title)}</h2>" if table.title else ""
    return f"{title}<table><tr>{head}</tr>{rows}</table>"


def notes() -> str:
    """How the figures of a report were made."""
    measures = "; ".join(f"{name}: {what}" for name, what in MEASURES.items())
    return (
        f"{measures}. Answers are compared as SQuAD does, without capitals, punctuation, articles and citations. "
        "Intervals hold the mean in 95 of 100 samples of the questions (bootstrap, percentiles); differences are taken "
        "question by question. A finding holds where its interval does not hold zero."
    )
