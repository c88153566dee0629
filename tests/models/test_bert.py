import dataclasses

import pytest

from jaxsft.models import FAMILIES

SHAPE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 258,
    "layer_norm_eps": 1e-5,
    "hidden_act": "gelu_new",
}
KINDS = {"bert": "Bert", "roberta": "Roberta"}
both = pytest.mark.parametrize("family", KINDS)


def read(family, **keys):
    usual = {"model_type": family, "architectures": [f"{KINDS[family]}ForMaskedLM"]}
    return FAMILIES[family].read_config({**SHAPE, **usual, **keys})


@both
def test_a_config_reads_into_the_shape_it_describes(family):
    found = read(family, type_vocab_size=1)
    positions = {"bert": (258, 0), "roberta": (256, 2)}[family]  # RoBERTa's table begins with two rows of no use
    assert dataclasses.astuple(found)[:9] == (96, 32, 48, 4, 4, *positions, 1, 1e-5)
    assert (found.activation, found.mlm) == ("gelu_new", True)
    assert found.mlm_activation == {"bert": "gelu_new", "roberta": "gelu"}[family]
    assert (found.tied, found.logit_scale, found.logit_soft_cap) == (True, 1.0, None)


@both
def test_keys_that_a_config_leaves_out_take_the_familys_defaults(family):
    sparse = {k: v for k, v in SHAPE.items() if k not in ("max_position_embeddings", "layer_norm_eps", "hidden_act")}
    found = FAMILIES[family].read_config({**sparse, "model_type": family})
    assert (found.max_position, found.first_position) == {"bert": (512, 0), "roberta": (510, 2)}[family]
    assert (found.norm_eps, found.activation, found.types, found.mlm) == (1e-12, "gelu", 2, False)


@both
@pytest.mark.parametrize(("architecture", "mlm"), [("ForMaskedLM", True), ("ForPreTraining", True), ("Model", False)])
def test_the_architecture_says_whether_there_is_a_head(family, architecture, mlm):
    assert read(family, architectures=[KINDS[family] + architecture]).mlm is mlm


def test_positions_of_roberta_begin_behind_its_padding_token():
    assert read("roberta", pad_token_id=5).first_position == 6


@both
def test_what_only_training_or_other_heads_need_is_harmless(family):
    keys = {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.2, "classifier_dropout": None}
    keys |= {"pooler_fc_size": 768, "directionality": "bidi", "gradient_checkpointing": False, "use_cache": True}
    assert read(family, **keys) == read(family)
    with pytest.raises(ValueError, match="has keys this family does not know: 'embedding_size' = 128"):
        read(family, embedding_size=128)


@both
@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"position_embedding_type": "relative_key"}, "'position_embedding_type' to 'relative_key'; only 'absolute'"),
        ({"is_decoder": True}, "'is_decoder' to True; only False"),
        ({"add_cross_attention": True}, "'add_cross_attention' to True; only False"),
        ({"tie_word_embeddings": False}, "'tie_word_embeddings' to False; only True"),
    ],
)
def test_what_would_be_another_model_is_refused(family, keys, message):
    with pytest.raises(ValueError, match=message):
        read(family, **keys)


@both
def test_another_head_is_refused_by_name(family):
    name = f"{KINDS[family]}ForTokenClassification"
    with pytest.raises(ValueError, match=rf"names the architecture '{name}'; supported are {KINDS[family]}ForMaskedLM"):
        read(family, architectures=[name])
    name = f"{KINDS[family]}ForSequenceClassification"
    with pytest.raises(ValueError, match=rf"names {name} with 2 labels .*; of classifiers only .* which have 1"):
        read(family, architectures=[name])
    ranks = read(family, architectures=[name], id2label={"0": "LABEL_0"}, tie_word_embeddings=False)
    assert (ranks.ranks, ranks.mlm) == (True, False)
    without = read(family, architectures=[f"{KINDS[family]}Model"], tie_word_embeddings=False)
    assert not without.mlm  # nothing is tied where there is no head
