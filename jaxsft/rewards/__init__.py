"""Reward functions: what an answer is worth, by any Python function of the prompt and the answer.

Strings and numbers go in and numbers come out; nothing here knows models. `load` finds functions by name and runs them
in processes of their own, so that code which raises, loops for ever or kills its process costs an episode its reward,
and never the run.
"""

from jaxsft.rewards.formats import json_valid, tags
from jaxsft.rewards.judge import Config, Failure, Judge, Scored, load, trouble
from jaxsft.rewards.lengths import length, overlong
from jaxsft.rewards.named import REWARDS, RewardError
from jaxsft.rewards.numbers import exact_number
from jaxsft.rewards.texts import exact_match, prefix_match, regex

__all__ = [
    "REWARDS",
    "Config",
    "Failure",
    "Judge",
    "RewardError",
    "Scored",
    "exact_match",
    "exact_number",
    "json_valid",
    "length",
    "load",
    "overlong",
    "prefix_match",
    "regex",
    "tags",
    "trouble",
]
