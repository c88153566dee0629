"""Four ways to answer the same questions, compared: a model alone or with passages, before or after fine-tuning.

    base               what the model knows
    base + passages    what it can read
    tuned              what it was taught
    tuned + passages   both

and the same once more after the documents have changed, when what was taught may be wrong. Each figure is a mean over
questions with the interval that holds it in 95 of 100 samples of questions; two ways are compared question by question,
which is much sharper than two intervals side by side.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from jaxsft.rag import answer, match
from jaxsft.rag.measure import interval
from jaxsft.rag.records import Hit
from jaxsft.rag.rows import Question, is_from
from jaxsft.run import read_metrics

BASE, RAG, TUNED, BOTH = "base", "base + passages", "tuned", "tuned + passages"
ARMS = (BASE, RAG, TUNED, BOTH)
RETRIEVES = (RAG, BOTH)
MEASURES = {
    "exact": "the answer has the wanted words and no others",
    "F1": "words in common with the wanted answer",
    "contains": "the wanted words stand somewhere in the answer",
    "cited": "all passages that the answer names are from the right document, and it names one",
}
KEPT, CHANGED, GONE, NEW = "as before", "changed", "gone", "new"  # what became of a question's answer


class Reply(NamedTuple):
    """What one way answered to a question."""

    text: str
    hits: tuple[Hit, ...] = ()  # that the model was shown; the first is [1]


class Round(NamedTuple):
    """Some questions, and the replies of each way, in their order."""

    name: str
    questions: Sequence[Question]
    replies: Mapping[str, Sequence[Reply]]


class Figure(NamedTuple):
    """A mean with the interval that it lies in."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.2f} [{self.low:.2f}, {self.high:.2f}]"

    @property
    def sure(self) -> bool:
        """Whether a difference is other than nothing."""
        return self.low > 0 or self.high < 0


def score(question: Question, reply: Reply, measure: str) -> float:
    """How good a reply is by one of `MEASURES`, from 0 to 1; NaN where it says nothing: a citation where nothing was
    shown, or where no document has the answer.

    Example:
      >>> from jaxsft.rag import Passage
      >>> reply = Reply("Wren [2].", (Hit(Passage("", "a.md"), 1.0), Hit(Passage("", "b.md"), 1.0)))
      >>> asked = Question("Who?", ("Wren.",), "b.md")
      >>> [score(asked, reply, measure) for measure in MEASURES]
      [1.0, 1.0, 1.0, 1.0]
    """
    if measure == "cited":
        return _cited(question, reply)
    compare = {"exact": match.exact, "F1": match.f1, "contains": match.contains}[measure]
    return max(compare(reply.text, wanted) for wanted in question.answers)


def _cited(question: Question, reply: Reply) -> float:
    if not question.source or not reply.hits:
        return float("nan")
    numbers = answer.cited(reply.text)
    shown = {number: hit.passage.source for number, hit in enumerate(reply.hits, 1)}
    return float(bool(numbers) and all(is_from(shown.get(number, ""), question.source) for number in numbers))


def scores(asked: Round, arm: str, measure: str) -> Float[np.ndarray, "N"]:
    """Of all questions."""
    replies = asked.replies[arm]
    return np.array([score(question, reply, measure) for question, reply in zip(asked.questions, replies, strict=True)])


def figure(values: Float[np.ndarray, "N"]) -> Figure | None:
    """The mean of what is no NaN; None where nothing is left.

    Example:
      >>> str(figure(np.array([1.0, 1.0, np.nan]))), figure(np.array([np.nan]))
      ('1.00 [1.00, 1.00]', None)
    """
    values = values[~np.isnan(values)]
    return Figure(*interval(values)) if len(values) else None


def difference(one: Float[np.ndarray, "N"], other: Float[np.ndarray, "N"]) -> Figure:
    """By how much one way is better than another, question by question.

    Example:
      >>> str(difference(np.array([1.0, 1.0]), np.array([0.0, 0.0])))
      '1.00 [1.00, 1.00]'
    """
    return Figure(*interval(one - other))


def found(asked: Round) -> Figure | None:
    """The share of the questions for which the right document was among what the model was shown."""
    arm = next((arm for arm in RETRIEVES if arm in asked.replies), None)
    if arm is None:
        return None
    pairs = zip(asked.questions, asked.replies[arm], strict=True)
    shown = [any(is_from(h.passage.source, q.source) for h in reply.hits) for q, reply in pairs if q.source]
    return figure(np.array(shown, np.float64)) if shown else None


def fates(before: Sequence[Question], after: Sequence[Question]) -> list[str]:
    """What became of the answers to some questions after the documents changed.

    Example:
      >>> old = [Question("a", ("x",)), Question("b", ("x",)), Question("c", ("x",))]
      >>> new = [Question(*pair) for pair in [("a", ("x",)), ("b", ("y",)), ("c", (answer.UNKNOWN,)), ("d", ("z",))]]
      >>> fates(old, new)
      ['as before', 'changed', 'gone', 'new']
    """
    known = {question.question: question.answers for question in before}

    def fate(question: Question) -> str:
        if question.question not in known:
            return NEW
        if question.answers == known[question.question]:
            return KEPT
        return GONE if match.exact(question.answers[0], answer.UNKNOWN) else CHANGED

    return [fate(question) for question in after]


class Cost(NamedTuple):
    """What a training run took."""

    steps: int
    learned: int  # tokens
    speed: float  # tokens a second, all that are no padding; the median

    def __str__(self) -> str:
        return f"{self.steps:,} steps, {self.learned:,} learned tokens, {self.speed:,.0f} tokens/s"


def cost(metrics: Path) -> Cost | None:
    """Reads what a run took from its metrics.jsonl; None where there is none."""
    lines = [line for line in read_metrics(metrics) if "trained_tokens" in line]
    if not lines:
        return None
    speed = float(np.median([line["tokens_per_second"] for line in lines]))
    return Cost(max(line["step"] for line in lines), int(sum(line["trained_tokens"] for line in lines)), speed)
