"""What the benchmarks share, a checkpoint of random weights; and that of images, small."""

from pathlib import Path

import jax
import pytest

from jaxsft import hub

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SMALL = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "tie_word_embeddings": True}


@pytest.mark.parametrize("kind", ["qwen3", "mixtral"])
def test_a_checkpoint_of_random_weights_loads(kind, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import quant

    experts = {"num_local_experts": 2, "num_experts_per_tok": 1} if kind == "mixtral" else {}
    quant.write_checkpoint(tmp_path, {"model_type": kind, **SMALL, **HEADS, **experts})
    _, variables = hub.load_variables(str(tmp_path))
    expected = hub.shapes(hub.read_config(tmp_path)[1])
    assert jax.tree.map(lambda x: x.shape, variables["params"]) == jax.tree.map(lambda x: x.shape, expected)


def test_the_benchmark_of_images_trains_on_what_it_draws(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import classify

    classify.draw(tmp_path, 10, size=(50, 25))
    shape = {**classify.SHAPE, **classify.SMALL}
    times = classify.ours("both", str(tmp_path), shape, batch=4, steps=2, workers=0)
    assert len(times) == 2
    assert min(times) > 0


def test_ways_to_find_the_nearest_vectors_find_them(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import rag

    monkeypatch.setattr(rag, "ROWS", 200)  # several parts
    for way in ("lance", "jax", "jax_bfloat16"):
        found = rag.vectors("clustered", way, 500, 4, 16)
        assert found["recall"] == 1.0 if way != "jax_bfloat16" else found["recall"] >= 0.8
        assert 0 < found["p50"] <= found["p99"]
    texts = rag.texts(3, words=10)
    assert [len(text.split()) for text in texts] == [11] * 3
    assert len(set(texts)) == 3


def test_the_sides_of_log_probabilities_do_the_same_work(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import logprobs

    for table in logprobs.TABLES:
        found = [side((16, 8, 40), table, 2, "cpu") for side in (logprobs.ours, logprobs.optax_whole)]
        assert [len(turn["times"]) for turn in found] == [2, 2]
        assert found[0]["loss"] == pytest.approx(found[1]["loss"], rel=1e-5)
        assert logprobs.summary(found)["fastest"] > 0
