import json
import random
import shutil
import signal
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import jaxsft
from jaxsft import hub, lora, sample
from jaxsft.data import DataError, templates
from jaxsft.run import RunError, read_metrics

ROOT = Path(__file__).parents[2]
TIMED = "tokens_per_second"


def arguments(model: str, rows: str, out: Path, **more) -> list[str]:
    given = {
        "model.path": model,
        "data.train": rows,
        "data.eval": rows,
        "data.max_length": 64,
        "tuning.lora.rank": 4,
        "tuning.lora.dropout": 0.1,
        "optim.learning_rate": 0.01,
        "train.batch_size": 8,
        "train.max_steps": 8,
        "train.save_every": 2,
        "train.eval_every": 4,
        "run.output_dir": out,
        "run.samples": 2,
        "sample.max_new_tokens": 8,
    } | {key.replace("__", "."): value for key, value in more.items()}
    return [part for key, value in given.items() for part in (f"--{key}", str(value))]


def untimed(file: Path) -> list[dict]:
    return [{key: value for key, value in row.items() if key != TIMED} for row in read_metrics(file)]


@pytest.fixture(scope="module")
def finished(run_here, small, rows, tmp_path_factory) -> Path:
    """A run that nothing interrupted."""
    out = tmp_path_factory.mktemp("finished") / "run"
    run_here("sft", *arguments(small, rows, out))
    return out


def test_a_run_leaves_what_it_promises(finished, small):
    lines = read_metrics(finished / "metrics.jsonl")
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 9))
    keys = {"step", "loss", "learning_rate", "grad_norm", "tokens_per_second", "trained_tokens"}
    assert all(set(line) == keys for line in steps)
    held = [(line["step"], line["eval_loss"]) for line in lines if "eval_loss" in line]
    assert [step for step, _ in held] == [0, 4, 8]
    assert held[-1][1] < held[0][1]
    assert (finished / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(int(p.name) for p in (finished / "checkpoints").iterdir()) == [4, 6, 8]
    for name in ("config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors"):
        assert (finished / "merged" / name).is_file(), name


def test_merged_answers_as_base_and_adapter_do(finished, small):
    base, params = hub.load(small)
    family, config = hub.read_config(Path(small))
    adapter = hub.load_adapter(str(finished / "adapter"), params, family=family, config=config)
    assert adapter.spec.rank == 4
    tokens = np.arange(40, dtype=np.int32).reshape(2, 20) * 7 % 2560
    with_adapter = base.features(lora.attach(params, adapter), tokens)
    merged, merged_params = hub.load(str(finished / "merged"))
    np.testing.assert_allclose(merged.features({"params": merged_params}, tokens), with_adapter, atol=1e-5)
    plain = base.features({"params": params}, tokens)
    assert np.abs(np.asarray(plain - with_adapter)).max() > 1e-2


def test_what_is_not_adapted_is_bitwise_the_base(finished, small):
    old, new = (load_file(Path(folder) / "model.safetensors") for folder in (small, finished / "merged"))
    assert old.keys() == new.keys()
    for name, value in old.items():
        same = value.tobytes() == new[name].tobytes()
        assert same != name.endswith("proj.weight"), name


def test_merge_later_gives_the_same_files(finished, small, run_here, tmp_path):
    run_here("merge", "--base", small, "--adapter", str(finished / "adapter"), "--out", str(tmp_path / "a"))
    run_here("merge", "--checkpoint", str(finished / "checkpoints" / "8"), "--out", str(tmp_path / "c"))
    wanted = (finished / "merged" / "model.safetensors").read_bytes()
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == wanted
    assert (tmp_path / "c" / "model.safetensors").read_bytes() == wanted
    run_here("merge", "--checkpoint", str(finished / "checkpoints" / "4"), "--out", str(tmp_path / "d"))
    assert (tmp_path / "d" / "model.safetensors").read_bytes() != wanted


@pytest.mark.parity  # a long one
def test_every_kind_of_adapter_goes_on_where_it_stopped_and_merges_later_to_the_same_weights(
    run_here, small, rows, tmp_path
):
    """DoRA from PiSSA's start, on the tables too, and norms beside it: what a run says of itself is enough."""
    more = {
        "tuning__lora__dora": "true",
        "tuning__lora__init": "pissa",
        "tuning__lora__targets": "embed|head|.*/(q|down)",
        "tuning__lora__rank_pattern": '{"head": 2}',
        "tuning__lora__alpha_pattern": '{".*/down": 5}',
        "tuning__trainable": '["norm/scale", ".*/attn_norm/scale"]',
        "optim__lora_plus": 4,
    }
    short = {"train__max_steps": 4, "train__eval_every": 0, "run__samples": 0}
    args, run = arguments(small, rows, tmp_path / "run", **short | more), tmp_path / "run"
    run_here("sft", *args)
    merged = (run / "merged" / "model.safetensors").read_bytes()
    run_here("merge", "--base", small, "--adapter", str(run / "adapter"), "--out", str(tmp_path / "a"))
    run_here("merge", "--checkpoint", str(run / "checkpoints" / "4"), "--out", str(tmp_path / "c"))
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == merged
    new = load_file(run / "merged" / "model.safetensors")
    for name, value in load_file(tmp_path / "c" / "model.safetensors").items():  # it decomposes the kernels once more
        np.testing.assert_allclose(value, new[name], atol=1e-6)
    shutil.rmtree(run / "checkpoints" / "4")
    shutil.rmtree(run / "merged")
    run_here("sft", *args, "--run.resume", "true")
    assert (run / "merged" / "model.safetensors").read_bytes() == merged
    old = load_file(Path(small) / "model.safetensors")
    ends = ("embed_tokens.weight", "lm_head.weight", "q_proj.weight", "down_proj.weight", "input_layernorm.weight")
    ends += ("model.norm.weight",)
    changed = {name for name in new if name not in old or not np.array_equal(old[name], new[name])}
    assert changed == {name for name in new if name.endswith(ends)}


@pytest.mark.parametrize(
    ("more", "changed"),
    [
        pytest.param({"tuning__method": "full"}, lambda name: True, id="full"),
        pytest.param({"tuning__method": "partial", "tuning__layers": 1}, lambda n: ".layers.1." in n, id="last layer"),
        pytest.param(
            {"tuning__method": "partial", "tuning__layers": -1}, lambda n: ".layers.0." in n, id="first layer"
        ),
        pytest.param(
            {"tuning__method": "partial", "tuning__trainable": '["blocks/.*norm/scale"]'},
            lambda name: "layernorm" in name,
            id="norms by pattern",
        ),
        pytest.param(
            {"tuning__layers": 1, "tuning__lora__init": "pissa"},
            lambda n: ".layers.1." in n and "proj" in n,
            id="pissa on the last layer",
        ),
    ],
)
def test_only_what_tuning_names_changes(more, changed, run_here, small, rows, tmp_path):
    short = {"train__max_steps": 2, "optim__weight_decay": 0.1, "run__samples": 0, "train__eval_every": 0}
    args = arguments(small, rows, tmp_path / "run", **short | more)
    run_here("sft", *args)
    old, new = (load_file(Path(folder) / "model.safetensors") for folder in (small, tmp_path / "run" / "merged"))
    differs = {name for name in old if old[name].tobytes() != new[name].tobytes()}
    assert differs == {name for name in old if changed(name)}
    assert (tmp_path / "run" / "adapter").exists() == ("tuning__method" not in more)
    run_here("merge", "--checkpoint", str(tmp_path / "run" / "checkpoints" / "2"), "--out", str(tmp_path / "later"))
    for name, value in load_file(tmp_path / "later" / "model.safetensors").items():
        np.testing.assert_allclose(value, new[name], atol=1e-6)


def same_as(finished: Path, other: Path) -> None:
    assert untimed(other / "metrics.jsonl") == untimed(finished / "metrics.jsonl")
    for file in ("adapter/adapter_model.safetensors", "merged/model.safetensors"):
        assert (other / file).read_bytes() == (finished / file).read_bytes(), file


def kill_and_resume(spawn, args: list[str], out: Path, kills: int, seed: int, longest: float) -> tuple[list[int], int]:
    """Starts a run again and again and kills it at a random moment, up to `longest` seconds after it began to learn.

    Returns the step that each process reached, and how many of the kills fell into a save.
    """
    draw, reached, metrics, saving = random.Random(seed), [], out / "metrics.jsonl", 0
    lines = lambda: set(metrics.read_text().splitlines()) if metrics.exists() else set()
    for _ in range(kills):
        before, process = lines(), spawn("sft", *args, "--run.resume", "true")
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if any(TIMED in line for line in lines() - before):  # a step of this process: its speed is its own
                break
            time.sleep(0.002)
        time.sleep(draw.uniform(0, longest))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        reached.append(max((row["step"] for row in read_metrics(metrics)), default=0))
        saving += any("tmp" in folder.name for folder in (out / "checkpoints").iterdir())
    process = spawn("sft", *args, "--run.resume", "true")
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    assert not [folder for folder in (out / "checkpoints").iterdir() if "tmp" in folder.name]
    return reached, saving


def uninterrupted(spawn, args: list[str]) -> None:
    process = spawn("sft", *args)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output


@pytest.mark.parity  # a long one
@pytest.mark.timeout(900)
def test_ten_kills_at_random_moments_change_nothing(spawn, small, rows, tmp_path):
    more = {"train__max_steps": 300, "train__save_every": 1, "train__eval_every": 50}
    uninterrupted(spawn, arguments(small, rows, tmp_path / "whole", **more))
    args = arguments(small, rows, tmp_path / "killed", **more)
    reached, saving = kill_and_resume(spawn, args, tmp_path / "killed", kills=10, seed=1, longest=1.2)
    print(f"killed after steps {reached}, {saving} of them during a save")
    assert len([step for step in reached if 0 < step < 300]) >= 8, f"the kills came too late or too early: {reached}"
    assert saving, "no kill fell into a save"
    same_as(tmp_path / "whole", tmp_path / "killed")


def test_resuming_a_finished_run_changes_nothing(finished, small, rows, run_here):
    before = untimed(finished / "metrics.jsonl")
    run_here("sft", *arguments(small, rows, finished), "--run.resume", "true")
    assert untimed(finished / "metrics.jsonl") == before


def test_a_folder_with_another_run_is_not_touched(finished, small, rows, run_here):
    with pytest.raises(RunError, match=r"holds another run.*--run.resume true.*--run.overwrite true"):
        run_here("sft", *arguments(small, rows, finished))
    assert (finished / "merged").exists()


def test_resuming_with_another_configuration_names_the_key(finished, small, rows, run_here):
    args = arguments(small, rows, finished, optim__learning_rate=0.02, train__seed=7)
    with pytest.raises(RunError, match=r"optim.learning_rate is 0.02, was 0.01; train.seed is 7, was 0"):
        run_here("sft", *args, "--run.resume", "true")


def test_a_loss_that_is_not_finite_keeps_the_last_good_checkpoint(run_here, small, rows, tmp_path):
    args = arguments(small, rows, tmp_path / "run", optim__learning_rate=1e30, optim__clip=0, train__save_every=1)
    with pytest.raises(RunError, match=r"step \d+: loss .*Nothing was saved since the last good checkpoint"):
        run_here("sft", *args)
    saved = [int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir()]
    good = [row["step"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in row]
    assert saved == good[-1:] or max(saved) <= max(good)
    assert not (tmp_path / "run" / "merged").exists()


def test_a_batch_that_the_mesh_cannot_share_is_refused(run_here, small, rows, tmp_path):
    with pytest.raises(RunError, match=r"train.batch_size is 6; it must divide by .* = 1 x 8 x 1"):
        run_here("sft", *arguments(small, rows, tmp_path / "run", train__batch_size=6))


LIMITED = """
import resource, runpy, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parity  # a long one
def test_a_full_disk_stops_with_the_remedy(spawn, small, rows, tmp_path):
    """A limit on the size of files stands in for the full disk: weights do not fit, metrics do."""
    (tmp_path / "limited.py").write_text(LIMITED)
    args = arguments(small, rows, tmp_path / "run", train__save_every=1, run__samples=0)
    process = spawn(tmp_path / "limited.py", str(ROOT / "scripts" / "sft.py"), *args)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 1, output
    for part in ("could not save a checkpoint", "Is the disk full?", "--run.resume true"):
        assert part in " ".join(output.split()), output


def test_the_step_zero_output_is_the_base(small):
    model, params = hub.load(small)
    adapter = lora.init(jax.random.key(0), params, jaxsft.LoRA(rank=4))
    tokens = np.arange(12, dtype=np.int32)[None]
    base = model.features({"params": params}, tokens)
    np.testing.assert_array_equal(model.features({"params": params, "lora": adapter}, tokens), base)


def test_the_quickstart_rows_hold_the_promised_one():
    file = Path(jaxsft.__file__).parent / "assets" / "quickstart" / "train.jsonl"
    found = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert {"instruction": "请问你是谁", "input": "", "output": "您好我是微调后的大模型"} in found


@pytest.mark.parity  # a long one
def test_changed_data_is_not_resumed_on(run_here, small, rows, tmp_path):
    own = tmp_path / "rows.jsonl"
    own.write_text(Path(rows).read_text())
    args = arguments(small, str(own), tmp_path / "run", train__max_steps=4)
    run_here("sft", *args)
    shutil.move(own, tmp_path / "moved.jsonl")  # the same data elsewhere is fine
    args = arguments(small, str(tmp_path / "moved.jsonl"), tmp_path / "run", train__max_steps=4)
    run_here("sft", *args, "--run.resume", "true")
    (tmp_path / "moved.jsonl").write_text(Path(rows).read_text().replace("It is 3.", "It is 4."))
    with pytest.raises(DataError, match=r"the data is not that of the checkpoint: .* restore it to continue"):
        run_here("sft", *args, "--run.resume", "true")


def test_sources_mix_and_a_template_is_exported(run_here, small, rows, tmp_path):
    """What the data section of a run file can say, down to the model that comes out."""
    more = tmp_path / "more.jsonl"
    talk = [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Me."}]
    more.write_text(json.dumps({"conversations": talk, "id": 1}) + "\n")
    settings = {
        "data": {
            "train": [rows, {"path": str(more), "format": "sharegpt", "epochs": 3}],
            "val_fraction": 0.2,
            "template": "plain",
        }
    }
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(settings))
    given = arguments(small, rows, tmp_path / "run", train__max_steps=2, run__samples=2)
    cut = [i for i, part in enumerate(given) if part in ("--data.train", "--data.eval")]
    rest = [part for i, part in enumerate(given) if i not in cut and i - 1 not in cut]
    run_here("sft", "--config", str(file), *rest)
    merged = tmp_path / "run" / "merged"
    assert (merged / "chat_template.jinja").read_text().rstrip("\n") == templates.source("plain")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(merged)
    asked = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert asked == "Hi\n"
    run_here("merge", "--checkpoint", str(tmp_path / "run" / "checkpoints" / "2"), "--out", str(tmp_path / "later"))
    run_here("merge", "--base", small, "--adapter", str(tmp_path / "run" / "adapter"), "--out", str(tmp_path / "third"))
    for folder in ("later", "third"):
        text = (tmp_path / folder / "chat_template.jinja").read_text()
        assert text.rstrip("\n") == templates.source("plain"), folder


@pytest.mark.parity  # a long one
def test_new_tokens_get_rows_that_train_and_reach_every_program(run_here, small, rows, tmp_path, capsys, monkeypatch):
    """On a mesh whose tensor axis does not divide the rows that there are then; the small model is tied."""
    own, out = tmp_path / "rows.jsonl", tmp_path / "run"
    own.write_text(Path(rows).read_text().replace("plus", "<plus>").replace("It is", "<is>"))
    more = {"model__new_tokens": '["<plus>", "<is>"]', "model__new_special_tokens": '["<|calc|>"]'}
    more |= {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2, "train__max_steps": 4, "train__eval_every": 0}
    args = arguments(small, str(own), out, **more, run__samples=0)
    run_here("sft", *args)
    said = "".join(part for part in capsys.readouterr().out.split() if part != "│")
    assert "3,inrows2,560to2,562of2,563" in said
    assert "params/((embed|head)/table|mlm/bias)" in said

    # ---- the rows: they began at the mean, and learned --------------------------------------------------------------
    old, new = (load_file(Path(folder) / "model.safetensors") for folder in (small, out / "merged"))
    name = "model.embed_tokens.weight"
    assert (old[name].shape, new[name].shape, "lm_head.weight" in new) == ((2560, 32), (2563, 32), False)
    moved = np.abs(new[name][2560:] - old[name].mean(axis=0)).max(axis=1)
    assert (moved > 0.005).all()  # four steps of Adam, of 0.01 at most
    assert json.loads((out / "merged" / "config.json").read_text())["vocab_size"] == 2563

    # ---- the folders: the same model, by every way to it ------------------------------------------------------------
    run_here("merge", "--base", small, "--adapter", str(out / "adapter"), "--out", str(tmp_path / "a"))
    run_here("merge", "--checkpoint", str(out / "checkpoints" / "4"), "--out", str(tmp_path / "c"))
    for file in (out / "merged").iterdir():
        for folder in ("a", "c"):
            assert (tmp_path / folder / file.name).read_bytes() == file.read_bytes(), (folder, file.name)
    shutil.rmtree(out / "merged")
    run_here("sft", *args, "--run.resume", "true")  # a finished run is restored, and exports again
    for file in (tmp_path / "a").iterdir():
        assert (out / "merged" / file.name).read_bytes() == file.read_bytes()

    # ---- chat: the tokenizer lies with the adapter, and nothing needs to be said ------------------------------------
    asked = []
    monkeypatch.setattr(
        sample, "stream", lambda model, variables, ids, **_: iter(asked.append((model, variables, ids)) or [])
    )
    run_here("chat", "--model", small, "--adapter", str(out / "adapter"), "--ask", "What is 1 <plus> 2?")
    run_here("chat", "--model", str(out / "merged"), "--ask", "What is 1 <plus> 2?")
    (model, variables, ids), (_, whole, again) = asked
    assert ids.count(2560) == 1
    assert ids == again
    tokens = np.array([ids], np.int32)
    np.testing.assert_allclose(model.features(variables, tokens), model.features(whole, tokens), atol=1e-5)


def test_a_token_without_a_row_ends_a_run_before_it_learns(run_here, small, rows, tmp_path):
    """As of a tokenizer that was given a token, and a model that was not."""
    from transformers import AutoTokenizer

    base = shutil.copytree(small, tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["plus"])
    tokenizer.save_pretrained(base)
    with pytest.raises(DataError, match=r"rows.jsonl becomes tokens as large as 2560, and the model has 2560"):
        run_here("sft", *arguments(str(base), rows, tmp_path / "run", run__samples=0))


def packed_run(small: str, rows: str, out: Path) -> list[str]:
    return arguments(small, rows, out, model__quantise="nf4", data__eval="", train__max_steps=4)


def test_a_run_over_packed_kernels_merges_into_the_full_precision_base_and_says_so(
    run_here, small, rows, tmp_path, capsys
):
    out = tmp_path / "run"
    unframed = lambda: "".join(part for part in capsys.readouterr().out.split() if part != "│")
    run_here("sft", *packed_run(small, rows, out))
    assert f"{small},itsownfilesinfullprecision,notthenf4copy" in unframed()
    old, new = (load_file(Path(folder) / "model.safetensors") for folder in (small, out / "merged"))
    for name, value in old.items():
        change = new[name] - value
        assert np.linalg.matrix_rank(change, tol=1e-5) == 4 if "proj" in name else not np.any(change), name
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == small
    run_here("merge", "--checkpoint", str(out / "checkpoints" / "4"), "--out", str(tmp_path / "later"))
    assert "notthenf4copy" in unframed()
    merged = (out / "merged" / "model.safetensors").read_bytes()
    assert (tmp_path / "later" / "model.safetensors").read_bytes() == merged


@pytest.mark.parity  # a long one
def test_a_run_over_packed_kernels_resumes_exactly(spawn, small, rows, tmp_path):
    args = {name: packed_run(small, rows, tmp_path / name) for name in ("whole", "resumed")}
    uninterrupted(spawn, args["whole"])
    uninterrupted(spawn, args["resumed"])
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "4")
    shutil.rmtree(tmp_path / "resumed" / "merged")
    uninterrupted(spawn, [*args["resumed"], "--run.resume", "true"])
    same_as(tmp_path / "whole", tmp_path / "resumed")


def test_a_reward_model_is_not_taught_to_answer(run_here, small, rows, tmp_path):
    kernel = np.ones((32, 1), np.float32)
    hub.merge(small, str(tmp_path / "judge"), trained={"score": {"kernel": kernel}})
    args = arguments(str(tmp_path / "judge"), rows, tmp_path / "run")
    with pytest.raises(ValueError, match=r"scores whole texts: config.json's architectures name a ...ForSequenceClass"):
        run_here("sft", *args)
    assert not (tmp_path / "run").exists()


def test_full_tuning_of_packed_kernels_is_refused(run_here, small, rows, tmp_path):
    args = arguments(small, rows, tmp_path / "run", model__quantise="int8", tuning__method="full")
    with pytest.raises(ValueError, match=r"attn/k/kernel is to train, but model.quantise packs it.*tuning.method lora"):
        run_here("sft", *args)
