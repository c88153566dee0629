"""Rewards for the length of an answer in tokens, to be added to others.

`completion_ids`, the tokens of the answer, is not a column of the data: whoever samples the answers gives it.
"""

from collections.abc import Sequence


def length(prompt: str, completion: str, completion_ids: Sequence[int], target: int) -> float:
    """1 for an answer of `target` tokens, falling evenly to 0 at none and at twice as many.

    Args:
      prompt, completion: not looked at.
      completion_ids: the answer's tokens.
      target: how many there should be; an argument, or else the row's column `target`.

    Raises:
      ValueError: target is below 1.

    Example:
      >>> [length("", "", range(n), target=100) for n in (50, 100, 175, 400)]
      [0.5, 1.0, 0.25, 0.0]
    """
    if target < 1:
        raise ValueError(f"target is {target} tokens; it must be at least 1")
    return max(0.0, 1 - abs(len(completion_ids) - target) / target)


def overlong(prompt: str, completion: str, completion_ids: Sequence[int], limit: int, margin: int) -> float:
    """DAPO's soft punishment: 0 up to limit - margin tokens, falling evenly to -1 at the limit, -1 beyond.

    Args:
      prompt, completion: not looked at.
      completion_ids: the answer's tokens.
      limit: L_max, the most tokens that an answer may have.
      margin: L_cache, how many tokens before the limit punishment begins.

    Raises:
      ValueError: margin is not between 0 and the limit.

    Example:
      >>> [overlong("", "", range(n), limit=100, margin=20) for n in (80, 90, 100, 101)]
      [0.0, -0.5, -1.0, -1.0]

    Source: Yu et al. 2025, arXiv:2503.14476, equation 13.
    """
    if not 0 <= margin <= limit:
        raise ValueError(f"margin is {margin} tokens; it must be between 0 and the limit, {limit}")
    over = len(completion_ids) - (limit - margin)
    return -1.0 if over > margin else -max(over, 0) / max(margin, 1)
