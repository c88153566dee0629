import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxsft.data import DataError
from jaxsft.run import RunError, read_metrics

ROOT = Path(__file__).parents[2]
TIMED = "tokens_per_second"
LN2 = float(np.log(np.float32(2), dtype=np.float32))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> str:
    """Forty pairs: the sum in words that are liked, and in others."""
    file = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    lines = [
        {"prompt": f"What is {a} plus {b}?", "chosen": f"It is {a + b}, my friend.", "rejected": f"{a + b}. Go away."}
        for a in range(8)
        for b in range(5)
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return str(file)


@pytest.fixture(scope="module")
def judged(tmp_path_factory) -> str:
    """The same answers one by one, with a label."""
    file = tmp_path_factory.mktemp("judged") / "judged.jsonl"
    lines = [
        {"prompt": f"What is {a} plus {a}?", "completion": answer, "label": label}
        for a in range(12)
        for answer, label in ((f"It is {2 * a}, my friend.", True), (f"{2 * a}. Go away.", False))
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return str(file)


def arguments(model: str, rows: str, out: Path, **more) -> list[str]:
    given = {
        "model.path": model,
        "data.train": rows,
        "data.eval": rows,
        "data.max_length": 48,
        "tuning.lora.rank": 4,
        "preference.beta": 0.5,
        "optim.learning_rate": 0.01,
        "train.batch_size": 8,
        "train.max_steps": 6,
        "train.save_every": 3,
        "run.output_dir": out,
        "run.samples": 2,
        "sample.max_new_tokens": 4,
    } | {key.replace("__", "."): value for key, value in more.items()}
    return [part for key, value in given.items() for part in (f"--{key}", str(value))]


def untimed(file: Path) -> list[dict]:
    return [{key: value for key, value in row.items() if key != TIMED} for row in read_metrics(file)]


@pytest.fixture(scope="module")
def finished(run_here, small, pairs, tmp_path_factory) -> Path:
    """A run with an adapter that nothing interrupted."""
    out = tmp_path_factory.mktemp("finished") / "run"
    run_here("dpo", *arguments(small, pairs, out))
    return out


def test_a_run_begins_at_log_2_and_learns_what_is_preferred(finished):
    lines = read_metrics(finished / "metrics.jsonl")
    steps = [line for line in lines if "loss" in line]
    held = [line for line in lines if "eval_loss" in line]
    for found in (steps[0]["loss"], held[0]["eval_loss"]):  # of each pair it is exact, see tests/objectives
        assert found == pytest.approx(LN2, abs=1e-7)
    assert steps[0]["rewards_chosen"] == steps[0]["rewards_rejected"] == 0
    assert 0 <= steps[0]["kl"] < 1e-12
    metrics = {"rewards_chosen", "rewards_rejected", "margin", "accuracy", "logps_chosen", "logps_rejected", "kl"}
    assert all(metrics <= set(line) for line in steps)
    assert held[-1]["eval_accuracy"] > 0.9
    assert held[-1]["eval_margin"] > 0.1
    for name in ("loss.png", "metrics.png"):
        assert (finished / name).read_bytes().startswith(b"\x89PNG")


def test_people_see_how_sure_the_figures_are_and_some_pairs(run_here, small, pairs, tmp_path, capsys):
    more = {"train.max_steps": 1, "preference.loss": "{simpo: 1.0, sft: 0.1}", "export.merged": "false"}
    run_here("dpo", *arguments(small, pairs, tmp_path / "run", **more))
    shown = " ".join(capsys.readouterr().out.split())
    for words in ("prompt shared", "held-out pairs", "95 %", "prefers the longer", "log-probability of chosen less"):
        assert words in shown, words


def test_merged_weights_are_the_base_with_the_adapter_folded_in(finished, small):
    base, merged = (load_file(Path(folder) / "model.safetensors") for folder in (small, finished / "merged"))
    changed = {name for name in base if (base[name] != merged[name]).any()}
    assert changed == {name for name in base if "proj" in name}
    adapter = load_file(finished / "adapter" / "adapter_model.safetensors")
    assert all(".lora_A." in name or ".lora_B." in name for name in adapter)


def test_a_run_that_goes_on_from_a_checkpoint_ends_bit_by_bit_as_one_that_was_not_stopped(
    finished, run_here, small, pairs, tmp_path
):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    shutil.rmtree(out / "checkpoints" / "6")  # as if it had been killed after step 3
    shutil.rmtree(out / "merged")
    run_here("dpo", *arguments(small, pairs, out), "--run.resume", "true")
    assert untimed(out / "metrics.jsonl") == untimed(finished / "metrics.jsonl")
    ours, theirs = (load_file(folder / "merged" / "model.safetensors") for folder in (out, finished))
    for name, tensor in theirs.items():
        assert (ours[name] == tensor).all(), name


@pytest.mark.parity  # a long one
def test_a_precomputed_reference_trains_alike_and_is_computed_once(finished, run_here, small, pairs, tmp_path):
    kept = tmp_path / "cache"
    more = {"preference.reference": "precomputed", "data.cache": kept}
    for name in ("first", "second"):
        run_here("dpo", *arguments(small, pairs, tmp_path / name, **more))
    files = list(kept.glob("reference-*.npy"))
    assert len(files) == 2  # of data.train and of data.eval
    first, second, live = (untimed(f / "metrics.jsonl") for f in (tmp_path / "first", tmp_path / "second", finished))
    assert first == second
    for ours, theirs in zip(first, live, strict=True):
        for name in set(ours) & {"loss", "margin", "eval_loss", "eval_margin"}:
            assert ours[name] == pytest.approx(theirs[name], abs=2e-4), name
    for file in files:
        np.save(file, np.load(file) + 3)
    with pytest.raises(RunError, match="is not what the reference says, by 3 nats an answer; delete it"):
        run_here("dpo", *arguments(small, pairs, tmp_path / "third", **more))


@pytest.mark.parity  # a long one
@pytest.mark.parametrize("loss", ["kto", "bco"])
def test_answers_are_judged_one_by_one(run_here, small, judged, tmp_path, loss):
    more = {
        "preference.loss": loss,
        "train.microbatches": 2,
        "train.batch_size": 16,
        "export.merged": "false",
        "run.samples": 0,
    }
    run_here("dpo", *arguments(small, judged, tmp_path / "run", **more))
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    held = [line for line in lines if "eval_loss" in line]
    assert held[-1]["eval_reward_desirable"] > held[-1]["eval_reward_undesirable"]
    assert held[0]["eval_reward_desirable"] == 0


@pytest.mark.parity  # a long one
def test_with_full_tuning_the_reference_stays_what_it_was(run_here, small, pairs, tmp_path):
    more = {"tuning.method": "full", "optim.learning_rate": 0.001, "export.merged": "false", "run.samples": 0}
    run_here("dpo", *arguments(small, pairs, tmp_path / "run", **more))
    lines = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in line]
    assert lines[0]["loss"] == pytest.approx(LN2, abs=1e-7)
    assert lines[-1]["kl"] > 0
    assert lines[-1]["margin"] > 0


@pytest.mark.parity  # a long one
def test_over_a_packed_base_in_bfloat16_with_new_tokens_the_loss_begins_at_log_2_too(run_here, small, pairs, tmp_path):
    """The tables train then, and the reference keeps them as they were."""
    more = {"model.quantise": "nf4", "model.dtype": "bfloat16", "model.remat": "block", "train.max_steps": 2}
    more |= {"model.new_tokens": '["<sum>", "<diff>"]'}
    run_here("dpo", *arguments(small, pairs, tmp_path / "run", **more, **{"export.merged": "false", "run.samples": 0}))
    first, second = (line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in line)
    assert first["loss"] == pytest.approx(LN2, abs=1e-7)
    assert second["margin"] > 0


def test_rows_of_another_kind_are_refused_by_file_and_line(run_here, small, rows, pairs, tmp_path):
    with pytest.raises(DataError, match=r"rows.jsonl line 1: .*a conversation .*preferences, with chosen and rejected"):
        run_here("dpo", *arguments(small, rows, tmp_path))
    with pytest.raises(DataError, match=r"pairs.jsonl line 1: .*a preference .*answers with a label"):
        run_here("dpo", *arguments(small, pairs, tmp_path, preference__loss="kto"))


def test_a_plan_reads_no_weights(run_here, small, pairs, tmp_path, capsys):
    run_here("dpo", *arguments(small, pairs, tmp_path / "none", run__plan="true"))
    assert "what one device needs" in capsys.readouterr().out
    assert not (tmp_path / "none").exists()
