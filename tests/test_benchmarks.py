"""What the benchmarks share, a checkpoint of random weights; and that of images, small."""

from pathlib import Path

import jax
import pytest
from jax import P

from jaxsft import hub, sharding

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


@pytest.mark.parity  # a long one
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


def test_bytes_and_operations_are_read_off_a_step_with_their_loops(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import scaling

    mesh = sharding.mesh(2, 4)

    def layers(w, x):
        """Of three weights each is gathered over four devices and multiplied, and the result is summed over two."""
        step = lambda x, one: (jax.lax.psum(x @ jax.lax.all_gather(one, "fsdp", tiled=True), "data"), None)
        return jax.lax.scan(step, x, w)[0]

    spec = {"in_specs": (P(None, "fsdp", None), P()), "out_specs": P(), "check_vma": False}
    shapes = jax.ShapeDtypeStruct((3, 8, 8), "float32"), jax.ShapeDtypeStruct((5, 8), "float32")
    text = jax.jit(jax.shard_map(layers, mesh=mesh, **spec)).lower(*shapes).compile().as_text()
    moved = {one.kind: (one.devices, one.times, one.received) for one in scaling.collectives(text)}
    assert moved == {"all-gather": (4, 3, 8 * 8 * 4 * 3 / 4), "all-reduce": (2, 3, 2 * 5 * 8 * 4 / 2)}
    assert scaling.flops(text) == 3 * 2 * 5 * 8 * 8


def test_frozen_weights_are_gathered_layer_by_layer_once_forward_and_once_back(monkeypatch):
    """Widths are apart from each other and from ranks, so that each gathered array tells what it is."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import scaling

    shape = {"vocab_size": 640, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "head_dim": 20}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "model_type": "llama"}
    text, parameters = scaling.step_of(shape, (2, 4, 1), "lora", length=32)
    kernels = {(64, 80): 1, (80, 64): 1, (64, 40): 2, (64, 96): 2, (96, 64): 1}  # q, o, k and v, gate and up, down
    table = (640, 64)  # of the output layer; that of the embedding is never gathered
    counts = dict.fromkeys([*kernels, table], 0)
    for one in scaling.collectives(text):
        for _, size in scaling.dims(one.shape):
            assert len(size) < 2 or 640 not in size or tuple(size) == table  # no scores of tokens
            if one.kind == "all-gather" and tuple(size) in counts:
                counts[tuple(size)] += one.times
    visits = 2 * 3 * scaling.PIECES  # there and back, of three layers, in each microbatch
    assert counts.pop(table) == scaling.PIECES
    assert counts == {size: number * visits for size, number in kernels.items()}
    assert parameters == 2 * 640 * 64 + 64 + 3 * (2 * 64 * 80 + 2 * 64 * 40 + 3 * 64 * 96 + 2 * 64)


SCRIPT = """
import json, sys
sys.path.insert(0, {benchmarks!r})
import harness

args = harness.parser("", ["ours", "theirs", "broken"]).parse_args()
case = json.loads(args.case)
with open(case["log"], "a") as log:
    log.write(args.side + " ")
if args.side == "broken":
    raise SystemExit(1)
seconds = {{"ours": [1.0, 2.0, 4.0], "theirs": [4.0, 4.0, 4.0]}}[args.side]
harness.finish({{"first": 9.0, "times": seconds, "cores": [3.0], "work": 8}})
"""


def test_sides_take_turns_and_the_median_counts(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import harness
    import run

    script, log = tmp_path / "script.py", tmp_path / "log"
    script.write_text(SCRIPT.format(benchmarks=str(BENCHMARKS)))
    sides = ["ours", "theirs", "broken"]
    args = harness.parser("", sides).parse_args(["--turns", "2"])
    rows = harness.turns(str(script), {"name": "a case", "log": str(log)}, sides, args)
    assert log.read_text().split() == ["ours", "theirs", "broken", "ours", "theirs"]
    ours, _, broken = rows
    assert (ours["value"], ours["low"], ours["high"]) == (4.0, 2.0, 8.0)  # of 8, 4 and 2 tokens/s, twice
    assert (ours["first_s"], ours["core_s"]) == (9.0, 3.0)
    assert broken["failed"]
    harness.show(rows, tmp_path / "rows.json")
    assert "failed" in capsys.readouterr().out
    monkeypatch.setattr(run, "PEERS", ("theirs", "broken"))
    rows = [{"benchmark": "step", **row} for row in rows]
    assert run.ratio(rows[0], rows) == 2.0
    assert "| step | a case | ours | 4 | tokens/s | 2 to 8 | 2.00 |" in run.table(rows)
    run.plot(rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_of_seconds_less_is_faster(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import run

    row = lambda side, value: {"benchmark": "startup", "case": "first step", "side": side, "value": value, "unit": "s"}
    rows = [row("jaxsft", 2.0), row("torch", 3.0), row("TRL", 5.0)]
    assert run.ratio(rows[0], rows) == 1.5
