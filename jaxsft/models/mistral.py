"""Mistral 7B and its kin: Llama with a sliding window on every layer.

Source: Jiang et al. 2023, arXiv:2310.06825.
"""

from collections.abc import Mapping
from typing import Any

from jaxsft.models.block import DecoderConfig
from jaxsft.models.family import Family, Reader, read_shape, with_windows
from jaxsft.models.llama import NAMES, WEIGHTS


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    read = Reader(config)
    shape = read_shape(read)
    # null says that there is none; where the key is absent, transformers means 4096.
    window = read("sliding_window", None if "sliding_window" in config else 4096)
    read.finish()
    return with_windows(shape, [window] * shape.layers)


FAMILY = Family(
    read_config,
    NAMES,
    WEIGHTS,
    classifier="MistralForSequenceClassification",
    checkpoints=("mistralai/Mistral-7B-Instruct-v0.3",),
)
