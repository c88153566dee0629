"""Grouped-query attention over packed rows and over a cache, by the kernel that suits the backend.

One rule decides who sees whom, for training, prefill and decoding alike (`visible`): same segment, not later, within
the window; in an encoder the same segment alone.
"""

from jaxsft.models.attention.blocks import blocks
from jaxsft.models.attention.choice import BOTH_SIDES, SINKS, SOFT_CAPS, WINDOWS, attend, choose, describe
from jaxsft.models.attention.plain import plain, recall
from jaxsft.models.attention.where import NO_WINDOW, Where, visible

__all__ = [
    "BOTH_SIDES",
    "NO_WINDOW",
    "SINKS",
    "SOFT_CAPS",
    "WINDOWS",
    "Where",
    "attend",
    "blocks",
    "choose",
    "describe",
    "plain",
    "recall",
    "visible",
]
