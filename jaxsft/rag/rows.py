"""Rows that teach a model to answer from passages: the right one among others, or none, and then to say so.

    question, answer, source -> search -> the passage that has the answer, and others that only look like it
    -> the prompt that `ask` writes -> the answer with the passage's number, or "I do not know."

After RAFT (Zhang et al. 2024, arXiv:2403.10131): distractors beside the passage that answers, and a share of rows
without it. There such a row still wants the answer, to be learned by heart; here it wants the admission that the
passages do not tell, so that what the model knows by heart does not stand against documents that have changed.

Left out: a chain of thought before the answer, which RAFT has a larger model write.
"""

import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from jaxsft.data import Message
from jaxsft.data.chat import as_dicts
from jaxsft.data.rows import DataError
from jaxsft.data.sources import read as read_rows
from jaxsft.rag import answer, match
from jaxsft.rag.records import Hit

DEPTH = 12  # passages that are looked through for the one that answers, and for others that look like it
END = ".。!！?？"


class Question(NamedTuple):
    """A question whose answer is known."""

    question: str
    answers: tuple[str, ...]  # any of them is right; the first is taught
    source: str = ""  # of the document that has it; of a table its file, or one row of it


class Mined(NamedTuple):
    """A question with what a search found on it."""

    question: Question
    gold: Hit
    others: tuple[Hit, ...]  # without the answer, the likest first


def read(path: str) -> list[Question]:
    """Reads {"question", "answer", "source"} from a file of rows; an answer may be a list, of which each one is right.

    Raises:
      DataError: the file cannot be read, or a row has no question or no answer.

    Example:
      >>> read("jaxsft/assets/harbour/questions.jsonl")[0].source
      'boats.csv'
    """
    found = []
    for row in read_rows(path):
        said, wanted = row.fields.get("question"), row.fields.get("answer")
        answers = wanted if isinstance(wanted, list) else [wanted]
        words = [one for one in (said, *answers) if isinstance(one, str) and one.strip()]
        if len(words) != 1 + len(answers) or not answers:
            needs = '{"question": "...", "answer": "...", "source": "FILE"}'
            raise DataError(f"{row.place}: has no question and answer in words; a row is {needs}")
        found.append(Question(words[0], tuple(words[1:]), str(row.fields.get("source") or "")))
    return found


def is_from(source: str, wanted: str) -> bool:
    """Whether a passage's source is a document, or a row of it.

    Example:
      >>> is_from("boats.csv#3", "boats.csv"), is_from("boats.csv#3", "boats.csv#31")
      (True, False)
    """
    return source == wanted or source.startswith(f"{wanted}#")


def mine(questions: Sequence[Question], find: Callable[..., list[list[Hit]]]) -> Iterator[Mined]:
    """Searches for each question; one whose source has no passage is left out.

    Args:
      questions: with their sources.
      find: `search.Searcher.find_all`, or the like: (questions, k=..., where=...) -> hits of each.
    """
    for question, hits in zip(questions, find([one.question for one in questions], k=DEPTH), strict=True):
        right = [hit for hit in hits if is_from(hit.passage.source, question.source)]
        if not right:
            both = [[f"source={place}"] for place in (question.source, f"{question.source}#*")]
            right = [hit for where in both for hit in find([question.question], k=DEPTH, where=where)[0]]
        if right:
            best = max(right, key=lambda hit: _agreement(question, hit))
            yield Mined(question, best, tuple(hit for hit in hits if not _tells(question, hit, best)))


def _agreement(question: Question, hit: Hit) -> tuple[float, int]:
    """How well a passage fits an answer: does it hold it, and how many of the words of question and answer?"""
    held = max(match.contains(hit.passage.text, one) for one in question.answers)
    known = {*match.words(question.question), *match.words(question.answers[0])}
    return held, len(known & set(match.words(hit.passage.text)))


def _tells(question: Question, hit: Hit, gold: Hit) -> bool:
    """Whether a passage has the answer: the right one itself, one that overlaps with it, or one that says the same."""
    one, other = hit.passage, gold.passage
    if one.source == other.source and one.start < other.end and other.start < one.end:
        return True
    return any(match.contains(one.text, wanted) for wanted in question.answers)


def build(
    mined: Iterable[Mined], *, passages: int = 3, unknown: float = 0.2, seed: int = 0
) -> Iterator[dict[str, Any]]:
    """Writes rows of messages, one a question.

    Args:
      mined: from `mine`.
      passages: shown at most; each row has from one to so many, in any order.
      unknown: share of the rows without the passage that answers.
      seed: of the draws.

    Yields:
      {"messages": [{"role": "user", ...}, {"role": "assistant", ...}]}

    Example:
      >>> from jaxsft.rag import Passage
      >>> lamp = Hit(Passage("The lamp is red.", "lamp.md"), 1.0)
      >>> [row] = build([Mined(Question("What colour is the lamp?", ("Red.",)), lamp, ())], unknown=0.0)
      >>> row["messages"][0]["content"].splitlines()[0], row["messages"][1]["content"]
      ('[1] lamp.md', 'Red [1].')
    """
    draw = random.Random(seed)
    for one in mined:
        count, without = draw.randint(1, passages), draw.random() < unknown
        others = list(one.others[: count if without else count - 1])
        shown = others if without and others else [one.gold, *others]
        draw.shuffle(shown)
        said = cite(one.question.answers[0], shown.index(one.gold) + 1) if one.gold in shown else answer.UNKNOWN
        turns = (*answer.messages(one.question.question, shown), Message("assistant", said))
        yield {"messages": as_dicts(turns)}


def alone(questions: Iterable[Question]) -> Iterator[dict[str, Any]]:
    """Writes rows of the questions and answers alone, to be learned by heart.

    Example:
      >>> [[turn["content"] for turn in row["messages"]] for row in alone([Question("Who?", ("Wren.",))])]
      [['Who?', 'Wren.']]
    """
    for one in questions:
        turns = (Message("user", one.question), Message("assistant", one.answers[0]))
        yield {"messages": as_dicts(turns)}


def cite(text: str, number: int) -> str:
    """Puts the number of a passage behind an answer, before its full stop.

    Example:
      >>> cite("Wren keeps it.", 2), cite("是李山。", 1), cite("Wren", 3)
      ('Wren keeps it [2].', '是李山 [1]。', 'Wren [3]')
    """
    text = text.rstrip()
    body = text.rstrip(END)
    return f"{body} [{number}]{text[len(body) :]}"


def lines(rows: Iterable[dict[str, Any]]) -> str:
    """Rows as JSON lines."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
