"""Rewards for an answer of the right form, whatever it says."""

import json
import re
from collections.abc import Sequence


def json_valid(prompt: str, completion: str, keys: Sequence[str] = ()) -> float:
    """1 if the answer is JSON and nothing else, and an object with certain keys where some are named; 0 otherwise.

    Args:
      prompt: not looked at.
      completion: what the model wrote.
      keys: that the object must have; an argument, or else the row's column `keys`.

    Example:
      >>> json_valid("", '{"name": "Ada"}', keys=["name"]), json_valid("", '{"name": "Ada"}', keys=["age"])
      (1.0, 0.0)
      >>> json_valid("", 'Here you are: {"name": "Ada"}')
      0.0
    """
    try:
        value = json.loads(completion, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return 0.0
    return float(not keys or (isinstance(value, dict) and all(key in value for key in keys)))


def tags(prompt: str, completion: str, names: Sequence[str] = ("think", "answer")) -> float:
    """1 if the answer is <think>...</think><answer>...</answer>, each once, with spaces alone around them; 0 otherwise.

    Args:
      prompt: not looked at.
      completion: what the model wrote.
      names: of the tags, in order.

    Example:
      >>> tags("", "<think>2 and 2</think>\\n<answer>4</answer>"), tags("", "<think>2 and 2</think> 4")
      (1.0, 0.0)

    Source: DeepSeek-AI 2025, arXiv:2501.12948, section 2.2.2 (format rewards) and table 1.
    """
    pattern = r"\s*".join(f"<{re.escape(name)}>.*?</{re.escape(name)}>" for name in names)
    once = all(completion.count(f"{mark}{name}>") == 1 for name in names for mark in ("<", "</"))
    return float(once and bool(re.fullmatch(pattern, completion.strip(), re.DOTALL)))


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is not JSON")  # Python's reader takes NaN and Infinity
