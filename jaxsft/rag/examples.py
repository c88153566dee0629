"""Questions with the passage that answers each: what a retriever is taught on, and measured by.

    {"query": "When does it open?", "positive": "The library opens at half past nine.", "negative": "It has a cat."}

`anchor` and `question` mean query, and of rows for instruction tuning {"instruction", "input", "output"} are a question
and what answers it. `negative` may be missing, a string or a list (`negatives`), and `negative_1`,
`negative_2`, ... are more of them, as sentence-transformers has it.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from jaxsft import data
from jaxsft.data import DataError

QUERY, POSITIVE = ("query", "anchor", "question", "instruction"), ("positive", "output")


@dataclass(frozen=True)
class Config:
    """What to learn from."""

    train: str | list[str] = field(default_factory=list)
    """rows {"query", "positive"[, "negative"]}: a file, folder, glob or hub data set, or several"""
    eval: str | list[str] = field(default_factory=list)
    """rows to measure on"""
    val_fraction: float = 0.0
    """share of the passages that is held out with their questions, where there is no data.eval"""
    corpus: str | list[str] = field(default_factory=list)
    """rows {"text"} of further passages, among which the right one is to be found and hard negatives are mined; the
    passages of train and eval are among them anyway"""
    store: str = ""
    """a store of scripts/rag.py index, whose passages are among them, too"""


class Example(NamedTuple):
    query: str
    positive: str
    negatives: tuple[str, ...] = ()


def parse(fields: Mapping[str, Any]) -> Example:
    """Reads a row.

    Raises:
      DataError: a text is missing, empty or no text.

    Example:
      >>> parse({"anchor": "Why?", "positive": "So.", "negative": ["No.", "Never."]})
      Example(query='Why?', positive='So.', negatives=('No.', 'Never.'))
    """
    name, right = (next((name for name in known if name in fields), "") for known in (QUERY, POSITIVE))
    if not name or not right:
        raise DataError(f"columns {', '.join(fields)}; query (or anchor) and positive were expected")
    numbered = sorted(key for key in fields if key.startswith("negative_"))
    negatives = [one for key in ("negative", "negatives", *numbered) for one in _listed(fields.get(key))]
    for kind, text in ((name, fields[name]), (right, fields[right]), *(("negative", one) for one in negatives)):
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"{kind} is {text!r}; a text was expected")
    also = f"\n{fields['input']}" if name == "instruction" and fields.get("input") else ""
    return Example(fields[name] + also, fields[right], tuple(negatives))


def _listed(value: Any) -> Sequence[Any]:
    return () if value is None else value if isinstance(value, (list, tuple)) else (value,)


def read(path: str | Sequence[str]) -> list[Example]:
    """Reads all rows of a file, or of whatever `data.read` reads.

    Raises:
      DataError: a row cannot be used; the message names its place.
    """
    found = []
    for row in data.read(path):
        try:
            found.append(parse(row.fields))
        except DataError as error:
            raise DataError(f"{row.place}: {error}") from error
    return found


def texts(path: str | Sequence[str]) -> Iterator[str]:
    """The passages of a corpus: the column `text` of its rows.

    Raises:
      DataError: a row has none.
    """
    for row in data.read(path):
        if not isinstance(text := row.fields.get("text"), str) or not text.strip():
            raise DataError(f"{row.place}: text is {text!r}; a passage was expected")
        yield text


def passages(examples: Iterable[Example], more: Iterable[str] = ()) -> list[str]:
    """Every passage once, in the order of its first appearance.

    Example:
      >>> passages([Example("a", "p", ("n",)), Example("b", "n")], ["p", "more"])
      ['p', 'n', 'more']
    """
    held = (text for one in examples for text in (one.positive, *one.negatives))
    return list(dict.fromkeys([*held, *more]))


def hold_out(examples: Sequence[Example], share: float, seed: int = 0) -> tuple[list[Example], list[Example]]:
    """Splits by passage, so that no held-out question asks for what was learned: (to learn, to measure on).

    Example:
      >>> learned, held = hold_out([Example(f"q{i}", f"p{i // 2}") for i in range(20)], 0.3)
      >>> len(learned) + len(held), {one.positive for one in learned} & {one.positive for one in held}
      (20, set())
    """
    place = lambda text: int.from_bytes(hashlib.blake2b(f"{seed} {text}".encode(), digest_size=8).digest()) / 2**64
    held = [place(one.positive) < share for one in examples]
    pick = lambda wanted: [one for one, out in zip(examples, held, strict=True) if out == wanted]
    return pick(False), pick(True)
