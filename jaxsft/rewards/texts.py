"""Rewards for an answer that is, or begins as, or contains what it should."""

import re


def exact_match(prompt: str, completion: str, answer: str, ignore_case: bool = False) -> float:
    """1 if the answer is the row's `answer`, spaces around it aside; 0 otherwise.

    Args:
      prompt: not looked at.
      completion: what the model wrote.
      answer: of the row, the right one.
      ignore_case: whether "Paris" and "paris" are the same.

    Example:
      >>> exact_match("Capital of France?", " Paris\\n", "Paris"), exact_match("Capital of France?", "Paris.", "Paris")
      (1.0, 0.0)
    """
    said, right = completion.strip(), str(answer).strip()
    return float(said.casefold() == right.casefold() if ignore_case else said == right)


def prefix_match(prompt: str, completion: str, answer: str) -> float:
    """The share of the row's `answer` that is right up to the first wrong character, its end counting as one more.

        answer       7,3,8        five characters and the end: each is worth 1/6
        completion   7,3,8        6/6
        completion   7,3,8,1      5/6: it does not end there
        completion   7,8,8        2/6

    A model that is right only now and then learns from this where `exact_match` tells it nothing.

    Args:
      prompt: not looked at.
      completion: what the model wrote.
      answer: of the row, the right one.

    Example:
      >>> prefix_match("1,2:9,3", "3,4,5", "3,4,5"), prefix_match("1,2:9,3", "3,4", "3,4,5")
      (1.0, 0.5)

    Source: verl, tests/e2e/arithmetic_sequence, whose reward is 1 / (len + 1) for each character up to the first wrong.
    """
    right = str(answer)
    shared = next((i for i, (a, b) in enumerate(zip(completion, right, strict=False)) if a != b), None)
    if shared is None:
        shared = min(len(completion), len(right)) + (completion == right)
    return shared / (len(right) + 1)


def regex(prompt: str, completion: str, pattern: str, whole: bool = False) -> float:
    """1 if the answer matches a pattern, 0 otherwise.

    Args:
      prompt: not looked at.
      completion: what the model wrote.
      pattern: of Python's `re`; an argument, the same for all rows, or else the row's column `pattern`. It may start
        with (?s), dots match newlines, and (?i), case does not matter.
      whole: the whole answer has to match, rather than a part of it.

    Example:
      >>> clock = "[0-9]{2}:[0-9]{2}"
      >>> regex("When?", "At 17:30.", clock), regex("When?", "At 17:30.", clock, whole=True)
      (1.0, 0.0)
    """
    return float(bool(re.fullmatch(pattern, completion) if whole else re.search(pattern, completion)))
