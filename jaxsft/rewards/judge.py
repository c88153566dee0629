"""Several weighted reward functions over the answers of a rollout, and what became of those that failed."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from jaxsft.rewards.named import Manner, RewardError
from jaxsft.rewards.pool import Call, Pool

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Config:
    """What an answer is worth, by functions of its text."""

    functions: dict[str, float | dict[str, Any]] = field(default_factory=dict)
    """name to weight, or {name: {weight: 0.5, ...}} with arguments; a name is exact_match, exact_number, json_valid,
    length, overlong, prefix_match, regex, tags, package.module:function or path/to/file.py:function"""
    timeout: float = 10.0
    """seconds that one call may take; then its process is killed, and the answer has no reward"""
    workers: int = 1
    """processes that call them"""
    model: str = ""
    """a reward model to judge as well: an adapter of scripts/reward.py over the same base, or a whole checkpoint with
    the same tokens"""
    model_weight: float = 1.0
    """of its score"""


class Failure(NamedTuple):
    """An answer that a function could not judge."""

    function: str
    prompt: str
    answer: str
    error: str

    def __str__(self) -> str:
        return f"{self.function}: {self.error}\n  prompt: {_short(self.prompt)}\n  answer: {_short(self.answer)}"


class Scored(NamedTuple):
    """The rewards of N answers; NaN is none."""

    total: Float[np.ndarray, "N"]  # the weighted sum over the functions that gave one; NaN if none did
    parts: dict[str, Float[np.ndarray, "N"]]  # of each function, before its weight
    failures: list[Failure]


class Part(NamedTuple):
    """One term of the sum."""

    label: str  # what it is called in metrics
    name: str
    weight: float
    messages: bool  # does it take lists of messages?
    arguments: dict[str, Any]


class Judge:
    """Made by `load`: (prompts, answers, fields) -> `Scored`; as a context manager it ends its processes."""

    def __init__(self, parts: Sequence[Part], pool: Pool | None):
        self.parts, self.pool = parts, pool

    def __call__(self, prompts: Sequence[str], answers: Sequence[str], fields: Sequence[Row]) -> Scored:
        """Judges N answers.

        Args:
          prompts: of each answer.
          answers: what the model wrote, without the token that ended it.
          fields: the other columns of each prompt's row.

        Raises:
          ValueError: the three are not equally many.
        """
        calls, asked = [], []
        episodes = list(zip(prompts, answers, fields, strict=True))
        if self.pool is None:
            return Scored(np.full(len(episodes), np.nan, np.float32), {}, [])
        values = np.full((len(self.parts), len(episodes)), np.nan)
        errors: dict[tuple[int, int], str] = {}
        for number, manner in enumerate(self.pool.manners):
            for of, call in _calls(number, manner, episodes, self.parts[number].messages):
                if isinstance(call, str):
                    errors |= {(number, episode): call for episode in of}
                elif of:
                    calls.append(call)
                    asked.append(of)
        for call, of, outcome in zip(calls, asked, self.pool.run(calls), strict=True):
            for episode, one in zip(of, outcome.get("values", [outcome] * len(of)), strict=True):
                if "error" in one:
                    errors[call.function, episode] = one["error"]
                elif one["value"] is not None:
                    values[call.function, episode] = one["value"]
        failures = [
            Failure(self.parts[number].label, prompts[episode], answers[episode], error)
            for (number, episode), error in sorted(errors.items())
        ]
        parts = {part.label: row.astype(np.float32) for part, row in zip(self.parts, values, strict=True)}
        return Scored(total(values, np.array([part.weight for part in self.parts])), parts, failures)

    def close(self) -> None:
        """Ends the processes."""
        if self.pool is not None:
            self.pool.close()

    def __enter__(self) -> "Judge":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def load(
    functions: Mapping[str, float | Mapping[str, Any]],
    *,
    timeout: float = 10.0,
    workers: int = 1,
    required: bool = True,
) -> Judge:
    """Finds reward functions and starts the processes that run them.

    Args:
      functions: by name, see `named.find`: a weight, or {"weight": 1.0, ...} with arguments for the function. To take
        one function twice, call the two what you like and name it in `function`: {"digits": {"function": "regex",
        "pattern": "[0-9]"}}. With "messages": True a function that takes lists gets prompts and answers as messages,
        [{"role": "assistant", "content": "..."}], as TRL's own do.
      timeout: seconds that one call may take: one answer, or all of them for a function that takes lists.
      workers: processes. What takes lists runs in one of them.
      required: is it an error to name none? Otherwise no answer has a reward then.

    Returns:
      (prompts, answers, fields) -> Scored. Close it, or use it in a `with`.

    Raises:
      RewardError: no function, one that cannot be found or imported, a weight that is no number.

    Example:
      >>> with load({"exact_match": 1.0, "regex": {"weight": 0.5, "pattern": "^[0-9]+$"}}) as judge:
      ...     scored = judge(["2 + 2?", "3 + 3?"], ["4", "5"], [{"answer": "4"}, {"answer": "6"}])
      >>> scored.total.tolist(), scored.parts["exact_match"].tolist(), scored.failures
      ([1.5, 0.5], [1.0, 0.0], [])
    """
    if not functions and not required:
        return Judge([], None)
    if not functions:
        raise RewardError("reward.functions is empty; give a name and its weight, such as {exact_match: 1.0}")
    if workers < 1 or not timeout > 0:
        raise RewardError(f"reward.workers is {workers} and reward.timeout {timeout}; both must be above 0")
    parts = [_part(label, given) for label, given in functions.items()]
    return Judge(parts, Pool([(part.name, part.arguments) for part in parts], timeout=timeout, workers=workers))


def total(values: Float[np.ndarray, "F N"], weights: Float[np.ndarray, "F"]) -> Float[np.ndarray, "N"]:
    """Sums over the functions that gave a reward, by their weights; NaN where none did that counts.

    Example:
      >>> nan = float("nan")
      >>> total(np.array([[1.0, nan, nan], [0.0, 1.0, nan]]), np.array([1.0, 0.5])).tolist()
      [1.0, 0.5, nan]
    """
    given = ~np.isnan(values) & (weights != 0)[:, None]
    summed = np.where(given, values * weights[:, None], 0.0).sum(axis=0)
    return np.where(given.any(axis=0), summed, np.nan).astype(np.float32)


def trouble(scored: Scored) -> str:
    """Why a rollout teaches nothing: a function that failed on every answer, or no reward at all; "" where it does.

    Example:
      >>> nothing = np.full(2, np.nan, np.float32)
      >>> failures = [Failure("mine.py:f", "2 + 2?", "4", "KeyError: 'x' (mine.py line 3 in f)")] * 2
      >>> print(trouble(Scored(nothing, {"mine.py:f": nothing}, failures)))
      reward function mine.py:f failed on all 2 answers, on 2 of them alike: KeyError: 'x' (mine.py line 3 in f)
        prompt: 2 + 2?
        answer: 4
    """
    count = len(scored.total)
    for label in scored.parts:
        failed = [failure for failure in scored.failures if failure.function == label]
        if failed and len(failed) == count:
            first, times = _commonest(failed)
            told = str(first).removeprefix(f"{label}: ")
            return f"reward function {label} failed on all {count} answers, on {times} of them alike: {told}"
    if not count or not np.isnan(scored.total).all():
        return ""
    told = f"none of the {count} answers has a reward: "
    if scored.failures:
        first, times = _commonest(scored.failures)
        return f"{told}some functions failed, {times} times alike: {first}"
    return (
        f"{told}{', '.join(scored.parts)} gave none. They may look for a column that the rows do not have; rename it "
        "with data columns"
    )


def _commonest(failures: Sequence[Failure]) -> tuple[Failure, int]:
    """The first of the failures that are most often alike, and how often."""
    (error, times), *_ = Counter(failure.error for failure in failures).most_common(1)
    return next(failure for failure in failures if failure.error == error), times


def _part(label: str, given: float | Mapping[str, Any]) -> Part:
    arguments = dict(given) if isinstance(given, Mapping) else {"weight": given}
    weight, name, messages = (
        arguments.pop(*one) for one in (("weight", 1.0), ("function", label), ("messages", False))
    )
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
        raise RewardError(f"reward.functions gives {label} the weight {weight!r}; expected a number")
    return Part(label, str(name), float(weight), bool(messages), arguments)


def _calls(
    number: int, manner: Manner, episodes: Sequence[tuple[str, str, Row]], messages: bool
) -> Iterator[tuple[list[int], Call | str]]:
    """Yields (episodes, the call that judges them, or why there is none)."""
    if not manner.batch:
        for i, (prompt, answer, row) in enumerate(episodes):
            yield [i], _missing(manner, row) or Call(number, [prompt, answer], _taken(manner, row))
        return
    rows = [row for _, _, row in episodes]
    columns = {name: [row.get(name) for row in rows] for name in dict.fromkeys(name for row in rows for name in row)}
    turn = lambda role, text: [{"role": role, "content": text}] if messages else text
    both = {
        "prompts": [turn("user", prompt) for prompt, _, _ in episodes],
        "completions": [turn("assistant", answer) for _, answer, _ in episodes],
    }
    own = both if manner.takes is None else {name: both[name] for name in both if name in manner.never}
    yield list(range(len(rows))), _missing(manner, columns) or Call(number, [], own | _taken(manner, columns))


def _taken(manner: Manner, row: Row) -> dict[str, Any]:
    names = row if manner.takes is None else manner.takes
    return {name: row[name] for name in names if name in row and name not in manner.never}


def _missing(manner: Manner, row: Row) -> str:
    missing = [name for name in manner.needs if name not in row]
    if not missing:
        return ""
    return (
        f"it needs the column {', '.join(missing)}, and the row has {', '.join(row) or 'none'}; rename it with data "
        "columns, or give it as an argument in reward.functions"
    )


def _short(text: str, most: int = 200) -> str:
    flat = text.replace("\n", "\\n")
    return flat if len(flat) <= most else f"{flat[:most]}... ({len(text):,} characters)"
