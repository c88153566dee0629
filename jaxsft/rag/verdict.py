"""What follows from a comparison: rules, each with the figures that it stands on.

A difference counts where its interval, question by question, does not hold zero. What is recommended follows from five
questions: do passages help? does tuning? both together more than either? what falls when the documents change? and is
the right passage found at all?
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxsft.rag.compare import (
    BASE,
    BOTH,
    CHANGED,
    RAG,
    TUNED,
    Figure,
    Round,
    difference,
    fates,
    found,
    scores,
)

MEASURE = "exact"
LOW = 0.8  # share of questions whose document is found, below which the search is what to mend first


class Finding(NamedTuple):
    """One thing that the figures say."""

    claim: str
    evidence: str
    key: str = ""  # what the recommendation asks about
    holds: bool = False


def findings(before: Round, after: Round | None = None) -> list[Finding]:
    """Asks the figures, as far as the ways that were measured allow.

    Args:
      before: with the documents that tuning knew.
      after: with those that have changed, if that was measured.
    """
    asked = [_better(before, *pair) for pair in PAIRS] + [_search(before)]
    if after is not None:
        asked += [_stale(before, after, arm) for arm in (RAG, TUNED, BOTH)]
        asked += [_better(after, *pair, when="after: ") for pair in PAIRS[2:]]
    return [one for one in asked if one]


# One way and another, how the recommendation calls the pair, and what it is to be better.
PAIRS = (
    (RAG, BASE, "passages", "passages help the base model"),
    (TUNED, BASE, "tuning", "tuning helps"),
    (BOTH, RAG, "both over passages", "tuning adds to passages"),
    (BOTH, TUNED, "both over tuning", "passages add to tuning"),
)


def _better(asked: Round, one: str, other: str, key: str, claim: str, *, when: str = "") -> Finding | None:
    """Is one way better than another?"""
    if one not in asked.replies or other not in asked.replies:
        return None
    gap = difference(scores(asked, one, MEASURE), scores(asked, other, MEASURE))
    holds = gap.sure and gap.mean > 0
    harms = " (it is worse)" if gap.sure and gap.mean < 0 else ""
    evidence = f"{one} less {other}, {MEASURE}, {asked.name}: {_signed(gap)}"
    return Finding(f"{when}{claim}{harms}", evidence, when + key, holds)


def _search(asked: Round) -> Finding | None:
    share = found(asked)
    if share is None:
        return None
    holds = share.mean >= LOW
    return Finding(
        "the search finds the right document", f"among the passages shown, {asked.name}: {share}", "search", holds
    )


def _stale(before: Round, after: Round, arm: str) -> Finding | None:
    """Does a way get wrong what has changed, of what it had right?"""
    if arm not in before.replies or arm not in after.replies:
        return None
    place = {question.question: number for number, question in enumerate(before.questions)}
    fate = fates(before.questions, after.questions)
    changed = [number for number, one in enumerate(fate) if one == CHANGED]
    if not changed:
        return None
    then = scores(before, arm, MEASURE)[[place[after.questions[number].question] for number in changed]]
    gap = difference(scores(after, arm, MEASURE)[np.array(changed)], then)
    falls = gap.sure and gap.mean < 0
    evidence = f"{len(changed)} changed answers, {MEASURE}, after less before: {_signed(gap)}"
    return Finding(f"{arm}: falls where the documents have changed", evidence, f"{arm} falls", falls)


def _signed(gap: Figure) -> str:
    return f"{gap.mean:+.2f} [{gap.low:+.2f}, {gap.high:+.2f}]"


MEND = "Mend the search first: too often the right document is not among the passages, whatever model reads them."
BOTH_ADD = "Tune the model, and answer from passages: each adds to the other."
READ = "Answer from passages; tuning alone gets wrong what has changed since, and adds nothing to them."
PLAIN = "Answer from passages with the base model; tuning was not shown to be worth its cost."
AGAIN = "Tuning works until the documents change: tune again each time, or teach the model to read passages."
TUNE = "Tune the model; passages were not shown to add to it. Measure again when the documents change."
NEITHER = "Neither passages nor tuning was shown to help: read the answers, or try a larger model, before choosing."


def recommend(seen: Sequence[Finding]) -> str:
    """One recommendation, by the first rule that applies.

    Example:
      >>> recommend([Finding("", "", "passages", True), Finding("", "", "search", True)]) == PLAIN
      True
    """
    holds, asked = {one.key for one in seen if one.holds}, {one.key for one in seen}
    stale = f"{TUNED} falls" in holds
    reads = "passages" in holds
    if "search" in asked - holds and not holds & {"tuning", "passages"}:
        return MEND
    # What tuning adds, or passages, has to last: after a change only what is measured then counts.
    last = "after: " if f"{TUNED} falls" in asked else ""
    if {f"{last}both over passages", f"{last}both over tuning"} <= holds:
        return BOTH_ADD
    if reads:
        return READ if stale else PLAIN
    if "tuning" in holds:
        return AGAIN if stale else TUNE
    return NEITHER
