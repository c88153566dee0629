import json

import jax
import numpy as np
import pytest

from jaxsft import hub
from jaxsft.rag import rerank
from jaxsft.run import RunError

LABELS = {"architectures": ["BertForSequenceClassification"], "id2label": {"0": "LABEL_0"}}


@pytest.fixture(scope="module")
def folder(encoder):
    folder = encoder(**LABELS)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def test_a_score_is_that_of_the_pair_alone_by_the_first_token(folder, words):
    model, variables = hub.load_variables(str(folder))
    tokenizer = hub.load_tokenizer(str(folder))
    question, texts = "ab cd", ["", *words(6, 12), "efg " * 60]
    scores = rerank.load(str(folder), batch_tokens=80).score(question, texts)
    assert (scores.shape, scores.dtype) == ((8,), np.float32)
    head = jax.tree.map(np.asarray, variables["params"]["rank"])
    features = jax.jit(lambda tokens, segments, types: model.features(variables, tokens, None, segments, types=types))
    for text, score in zip(texts, scores, strict=True):
        read = tokenizer([question], [text], truncation=True, max_length=40)
        tokens, segments, types = (np.zeros((1, 40), np.int32) for _ in range(3))
        n = len(read["input_ids"][0])
        tokens[0, :n], segments[0, :n], types[0, :n] = read["input_ids"][0], 1, read["token_type_ids"][0]
        assert types.any()
        x = np.asarray(features(tokens, segments, types))[0, 0]
        x = np.tanh(x @ head["dense"]["kernel"] + head["dense"]["bias"])
        expected = (x @ head["out"]["kernel"] + head["out"]["bias"]).item()
        assert score == pytest.approx(expected, abs=1e-5)


def test_a_model_without_that_head_is_refused(encoder):
    with pytest.raises(
        RunError, match="does not score two texts together; choose a checkpoint whose config.json names"
    ):
        rerank.load(str(encoder()))


def test_a_tokenizer_of_a_bert_gives_types_and_one_of_no_model_only_if_told(tmp_path):
    assert rerank.gives_types(tmp_path)  # transformers makes a BertTokenizer of it
    for settings, expected in (
        ({"tokenizer_class": "BertTokenizer"}, True),
        ({"tokenizer_class": "PreTrainedTokenizerFast"}, False),
        ({"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": ["token_type_ids"]}, True),
        ({"tokenizer_class": "BertTokenizer", "model_input_names": ["input_ids"]}, False),
    ):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        assert rerank.gives_types(tmp_path) == expected
