"""Losses: pure functions of arrays, one paper a file. They know neither models nor parameter trees."""

from jaxsft.losses.advantage import discounted, gae, group, leave_one_out, reinforce, whiten
from jaxsft.losses.aggregate import AGGREGATES, LOSS_TYPES, LossType, aggregate
from jaxsft.losses.chunks import CHUNK, CHUNK_CPU, Chunk
from jaxsft.losses.classification import cross_entropy
from jaxsft.losses.contrastive import contrastive
from jaxsft.losses.divergence import DIVERGENCES
from jaxsft.losses.episodes import episode_count, episode_mean, episode_sum, last
from jaxsft.losses.kl import ESTIMATORS, adapt, kl
from jaxsft.losses.kto import UNPAIRED, ScoredAnswers, apo_zero_unpaired, bco, bco_shift, kto, kto_kl, unpaired
from jaxsft.losses.logprobs import entropies, logprobs, shift, top1
from jaxsft.losses.masked import mask_tokens
from jaxsft.losses.policy import POLICY, Policy, cispo, gspo, ppo, rloo, surrogate
from jaxsft.losses.preference import COUNTED, COUPLED, PREFERENCE, WITHOUT_REFERENCE, weighted
from jaxsft.losses.reward import bradley_terry
from jaxsft.losses.scored import Scored
from jaxsft.losses.sft import sft
from jaxsft.losses.summed import total
from jaxsft.losses.value import ValueLoss, clipped_value, explained_variance
from jaxsft.losses.weights import collision, ld_weights, wpo

__all__ = [
    "AGGREGATES",
    "CHUNK",
    "CHUNK_CPU",
    "COUNTED",
    "COUPLED",
    "DIVERGENCES",
    "ESTIMATORS",
    "LOSS_TYPES",
    "POLICY",
    "PREFERENCE",
    "UNPAIRED",
    "WITHOUT_REFERENCE",
    "Chunk",
    "LossType",
    "Policy",
    "Scored",
    "ScoredAnswers",
    "ValueLoss",
    "adapt",
    "aggregate",
    "apo_zero_unpaired",
    "bco",
    "bco_shift",
    "bradley_terry",
    "cispo",
    "clipped_value",
    "collision",
    "contrastive",
    "cross_entropy",
    "discounted",
    "entropies",
    "episode_count",
    "episode_mean",
    "episode_sum",
    "explained_variance",
    "gae",
    "group",
    "gspo",
    "kl",
    "kto",
    "kto_kl",
    "last",
    "ld_weights",
    "leave_one_out",
    "logprobs",
    "mask_tokens",
    "ppo",
    "reinforce",
    "rloo",
    "sft",
    "shift",
    "surrogate",
    "top1",
    "total",
    "unpaired",
    "weighted",
    "whiten",
    "wpo",
]
