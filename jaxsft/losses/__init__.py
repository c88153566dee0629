"""Losses: pure functions of arrays, one paper a file. They know neither models nor parameter trees."""

from jaxsft.losses.logprobs import CHUNK, CHUNK_CPU, logprobs, shift
from jaxsft.losses.masked import mask_tokens
from jaxsft.losses.sft import sft

__all__ = ["CHUNK", "CHUNK_CPU", "logprobs", "mask_tokens", "sft", "shift"]
