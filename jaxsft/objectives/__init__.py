"""Objectives: a model and a loss make one function of variables and a batch.

    Objective = (variables, batch, key | None) -> Sums

Sums, never means: whoever adds several batches divides once. A key switches dropout on; None is for evaluation.
"""

from jaxsft.objectives.classification import Classification, classification
from jaxsft.objectives.contrastive import contrastive
from jaxsft.objectives.episodes import Assessed, Judged, critic, policy_of, seen_as
from jaxsft.objectives.grpo import GRPO, METHODS
from jaxsft.objectives.grpo import learning as grpo_learning
from jaxsft.objectives.grpo import scoring as grpo_scoring
from jaxsft.objectives.judged import judged
from jaxsft.objectives.language import Objective, expect, head_of, supervised
from jaxsft.objectives.masked import masked
from jaxsft.objectives.pairs import Each, Pairwise, reference
from jaxsft.objectives.policy import policy
from jaxsft.objectives.ppo import PPO
from jaxsft.objectives.ppo import scoring as ppo_scoring
from jaxsft.objectives.preference import Config, of, preference, said
from jaxsft.objectives.reward import Config as Reward
from jaxsft.objectives.reward import bradley_terry

__all__ = [
    "GRPO",
    "METHODS",
    "PPO",
    "Assessed",
    "Classification",
    "Config",
    "Each",
    "Judged",
    "Objective",
    "Pairwise",
    "Reward",
    "bradley_terry",
    "classification",
    "contrastive",
    "critic",
    "expect",
    "grpo_learning",
    "grpo_scoring",
    "head_of",
    "judged",
    "masked",
    "of",
    "policy",
    "policy_of",
    "ppo_scoring",
    "preference",
    "reference",
    "said",
    "seen_as",
    "supervised",
]
