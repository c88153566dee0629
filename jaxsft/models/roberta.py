"""RoBERTa: BERT with other names, and positions that begin behind the padding token's.

Source: Liu et al. 2019, arXiv:1907.11692; positions: `make_positions` of fairseq.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxsft.models.bert import RULES, names, read_encoder
from jaxsft.models.encoder import EncoderConfig
from jaxsft.models.family import Family, Reader


def read_config(config: Mapping[str, Any]) -> EncoderConfig:
    read = Reader(config)
    shape = read_encoder(read, "Roberta", padding=read("pad_token_id", 1))
    read.finish()
    return dataclasses.replace(shape, mlm_activation="gelu")  # whatever the layers have


FAMILY = Family(
    read_config,
    names(
        "roberta", "lm_head.dense", "lm_head.layer_norm", "lm_head.bias", ("classifier.dense", "classifier.out_proj")
    ),
    RULES,
    prefix="roberta.",
    copies=(
        ("lm_head.decoder.weight", "roberta.embeddings.word_embeddings.weight"),
        ("lm_head.decoder.bias", "lm_head.bias"),
    ),
    unused=(r"(roberta\.)?pooler\..*",),
    task=None,
    checkpoints=(
        "FacebookAI/roberta-base",
        "sentence-transformers/all-distilroberta-v1",
    ),
)
