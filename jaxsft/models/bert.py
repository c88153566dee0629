"""BERT, and the sentence encoders that are BERTs without a head: MiniLM, BGE, E5.

With ...ForSequenceClassification and one label it is a cross-encoder, such as ms-marco-MiniLM. Other heads (next
sentences, poolers without a classifier) are carried along, not computed.
Source: Devlin et al. 2018, arXiv:1810.04805.
"""

from collections.abc import Mapping
from typing import Any

from jax.sharding import PartitionSpec as P

from jaxsft.models import family
from jaxsft.models.encoder import EncoderConfig
from jaxsft.models.family import Family, Name, Reader, Rules, read_labels

# Of training, of heads that are not computed here, of ways to compute the same, and of what a score is used for.
NEUTRAL = (
    "sbert_ce_default_activation_function",
    "sentence_transformers",
    "attention_probs_dropout_prob",
    "classifier_dropout",
    "directionality",
    "gradient_checkpointing",
    "hidden_dropout_prob",
    "output_past",
    "pooler_fc_size",
    "pooler_num_attention_heads",
    "pooler_num_fc_layers",
    "pooler_size_per_head",
    "pooler_type",
)


def read_encoder(read: Reader, kind: str, *, padding: int | None = None) -> EncoderConfig:
    """Reads what BERT and its relatives have in common, and whether there is a head that predicts masked tokens.

    Args:
      read: of the config.
      kind: how the names of architectures begin.
      padding: the token whose position comes before those of documents, where the table has one for it (RoBERTa).

    Raises:
      ValueError: another head, a classifier of several labels, or a key at a value that is not supported.
    """
    heads = {f"{kind}ForMaskedLM": True, f"{kind}ForPreTraining": True, f"{kind}Model": False}
    heads[f"{kind}ForSequenceClassification"] = False
    named = read("architectures", [f"{kind}Model"])
    if unknown := sorted(set(named) - set(heads)):
        raise ValueError(f"config.json names the architecture {unknown[0]!r}; supported are {', '.join(heads)}")
    mlm, first = any(heads[name] for name in named), 0 if padding is None else padding + 1
    read.expect("position_embedding_type", "absolute")
    read.expect("is_decoder", False)
    read.expect("add_cross_attention", False)
    read.expect("tie_word_embeddings", True, *([] if mlm else [False]))
    read.skip(*NEUTRAL)
    activation = read("hidden_act", "gelu")
    return EncoderConfig(
        vocab_size=read("vocab_size"),
        hidden=read("hidden_size"),
        mlp_hidden=read("intermediate_size"),
        layers=read("num_hidden_layers"),
        heads=read("num_attention_heads"),
        max_position=read("max_position_embeddings", 512) - first,
        first_position=first,
        types=read("type_vocab_size", 2),
        norm_eps=read("layer_norm_eps", 1e-12),
        activation=activation,
        mlm=mlm,
        mlm_activation=activation,
        ranks=bool(read_labels(read)),
    )


def read_config(config: Mapping[str, Any]) -> EncoderConfig:
    read = Reader(config)
    shape = read_encoder(read, "Bert")
    read.finish()
    return shape


def names(base: str, dense: str, norm: str, bias: str, rank: tuple[str, str]) -> tuple[Name, ...]:
    """The names of a BERT called `base`, and those of its heads."""
    layer = f"{base}.encoder.layer.{{layer}}"
    return (
        Name("embed/table", f"{base}.embeddings.word_embeddings.weight"),
        Name("embed/positions", f"{base}.embeddings.position_embeddings.weight"),
        Name("embed/types", f"{base}.embeddings.token_type_embeddings.weight"),
        *family.norm("embed/norm", f"{base}.embeddings.LayerNorm"),
        *family.dense("blocks/attn/q", f"{layer}.attention.self.query"),
        *family.dense("blocks/attn/k", f"{layer}.attention.self.key"),
        *family.dense("blocks/attn/v", f"{layer}.attention.self.value"),
        *family.dense("blocks/attn/o", f"{layer}.attention.output.dense"),
        *family.norm("blocks/attn_norm", f"{layer}.attention.output.LayerNorm"),
        *family.dense("blocks/mlp/up", f"{layer}.intermediate.dense"),
        *family.dense("blocks/mlp/down", f"{layer}.output.dense"),
        *family.norm("blocks/mlp_norm", f"{layer}.output.LayerNorm"),
        *family.dense("mlm/dense", dense),
        *family.norm("mlm/norm", norm),
        Name("mlm/bias", bias),
        *family.dense("rank/dense", rank[0]),
        *family.dense("rank/out", rank[1]),
    )


# As Llama's: `tensor` cuts heads, hidden units of the MLP and the vocabulary, `fsdp` the rest.
RULES: Rules = (
    ("embed/table", P("tensor", "fsdp")),
    ("embed/(positions|types)", P(None, "fsdp")),
    ("embed/norm/(scale|bias)", P(None)),
    ("blocks/[^/]+/(attn/[qkv]|mlp/up)/kernel", P(None, "fsdp", "tensor")),
    ("blocks/[^/]+/(attn/o|mlp/down)/kernel", P(None, "tensor", "fsdp")),
    ("blocks/[^/]+/(attn/[qkv]|mlp/up)/bias", P(None, "tensor")),
    ("blocks/[^/]+/(attn/o|mlp/down)/bias", P(None, None)),
    ("blocks/[^/]+/(attn|mlp)_norm/(scale|bias)", P(None, None)),
    ("mlm/dense/kernel", P("fsdp", "tensor")),
    ("mlm/(dense/)?bias", P("tensor")),
    ("mlm/norm/(scale|bias)", P(None)),
    ("rank/dense/kernel", P("fsdp", "tensor")),
    ("rank/dense/bias", P("tensor")),
    ("rank/out/kernel", P("tensor", None)),
    ("rank/out/bias", P(None)),
)

FAMILY = Family(
    read_config,
    names(
        "bert",
        "cls.predictions.transform.dense",
        "cls.predictions.transform.LayerNorm",
        "cls.predictions.bias",
        ("bert.pooler.dense", "classifier"),
    ),
    RULES,
    prefix="bert.",
    copies=(
        ("cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"),
        ("cls.predictions.decoder.bias", "cls.predictions.bias"),
    ),
    unused=(r"(bert\.)?pooler\..*", r"cls\.seq_relationship\..*"),
    task=None,
    checkpoints=(
        "google-bert/bert-base-uncased",
        "sentence-transformers/all-MiniLM-L6-v2",
        "BAAI/bge-small-en-v1.5",
    ),
)
