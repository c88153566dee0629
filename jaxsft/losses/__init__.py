"""Losses: pure functions of arrays, one paper a file. They know neither models nor parameter trees."""

from jaxsft.losses.chunks import CHUNK, CHUNK_CPU
from jaxsft.losses.divergence import DIVERGENCES
from jaxsft.losses.kto import UNPAIRED, ScoredAnswers, apo_zero_unpaired, bco, bco_shift, kto, kto_kl, unpaired
from jaxsft.losses.logprobs import entropies, logprobs, shift
from jaxsft.losses.masked import mask_tokens
from jaxsft.losses.preference import COUNTED, COUPLED, PREFERENCE, WITHOUT_REFERENCE, weighted
from jaxsft.losses.reward import bradley_terry
from jaxsft.losses.scored import Scored
from jaxsft.losses.sft import sft
from jaxsft.losses.weights import collision, ld_weights, wpo

__all__ = [
    "CHUNK",
    "CHUNK_CPU",
    "COUNTED",
    "COUPLED",
    "DIVERGENCES",
    "PREFERENCE",
    "UNPAIRED",
    "WITHOUT_REFERENCE",
    "Scored",
    "ScoredAnswers",
    "apo_zero_unpaired",
    "bco",
    "bco_shift",
    "bradley_terry",
    "collision",
    "entropies",
    "kto",
    "kto_kl",
    "ld_weights",
    "logprobs",
    "mask_tokens",
    "sft",
    "shift",
    "unpaired",
    "weighted",
    "wpo",
]
