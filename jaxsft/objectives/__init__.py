"""Objectives: a model and a loss make one function of variables and a batch.

    Objective = (variables, batch, key | None) -> Sums

Sums, never means: whoever adds several batches divides once. A key switches dropout on; None is for evaluation.
"""

from jaxsft.objectives.judged import judged
from jaxsft.objectives.language import Objective, expect, supervised
from jaxsft.objectives.masked import masked
from jaxsft.objectives.pairs import Each, Pairwise, reference
from jaxsft.objectives.preference import Config, of, preference, said
from jaxsft.objectives.reward import Config as Reward
from jaxsft.objectives.reward import bradley_terry

__all__ = [
    "Config",
    "Each",
    "Objective",
    "Pairwise",
    "Reward",
    "bradley_terry",
    "expect",
    "judged",
    "masked",
    "of",
    "preference",
    "reference",
    "said",
    "supervised",
]
