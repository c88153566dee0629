"""scripts/classify.py and scripts/predict.py, whole: what they leave is what transformers and PEFT load."""

import importlib.util
import json
import random
import signal
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import jaxsft
from jaxsft import hub
from jaxsft.data import DataError
from jaxsft.run import RunError, read_metrics

from ..scripts.conftest import ROOT, run_here, spawn  # noqa: F401

pytestmark = pytest.mark.parity
SHAPES = Path(jaxsft.BASE).parent / "shapes"


def drawer():
    spec = importlib.util.spec_from_file_location("make_shapes", SHAPES / "make_shapes.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> Path:
    """train/ of 45 and held/ of 15 drawings in folders of five classes; one class has three times as many."""
    folder, made, chance = tmp_path_factory.mktemp("shapes"), drawer(), random.Random(0)
    for name, count in (("train", 45), ("held", 15)):
        for number in range(count):
            label = made.CLASSES[number % 5]
            if name == "train" and number >= 30:
                label = made.CLASSES[0]
            file = folder / name / label / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            made.draw(label, chance).save(file)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    """A vision transformer of two layers, random weights, a head of two classes that nobody wants."""
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("base")
    raw = json.loads((SHAPES / "config.json").read_text())
    raw |= {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "initializer_range": 0.1}
    (source / "config.json").write_text(json.dumps(raw))
    (source / "preprocessor_config.json").write_text((SHAPES / "preprocessor_config.json").read_text())
    _, params = hub.init(str(source), jax.random.key(0))
    hub.export(str(folder), params, source=str(source))
    return str(folder)


def arguments(base: str, shapes: Path, out: Path, **more) -> list[str]:
    given = {
        "model.path": base,
        "data.train": shapes / "train",
        "data.eval": shapes / "held",
        "data.class_weights": "balanced",
        "augment.mixup": 0.2,
        "augment.label_smoothing": 0.1,
        "tuning.lora.rank": 4,
        "optim.learning_rate": 0.01,
        "train.batch_size": 16,
        "train.max_steps": 8,
        "train.save_every": 2,
        "train.eval_every": 4,
        "run.output_dir": out,
    } | {key.replace("__", "."): value for key, value in more.items()}
    return [part for key, value in given.items() for part in (f"--{key}", str(value))]


@pytest.fixture(scope="module")
def finished(spawn, base, shapes, tmp_path_factory) -> Path:  # noqa: F811
    out = tmp_path_factory.mktemp("finished") / "run"
    process = spawn("classify", *arguments(base, shapes, out))
    output, _ = process.communicate(timeout=280)
    assert process.returncode == 0, output
    assert "images/s" in output
    assert "nearest neighbours" in output
    return out


def said(finished: Path) -> list[dict]:
    return [json.loads(line) for line in (finished / "predictions.jsonl").read_text().splitlines()]


def test_a_run_leaves_what_it_promises(finished):
    lines = read_metrics(finished / "metrics.jsonl")
    held = [line for line in lines if "eval_loss" in line]
    assert [line["step"] for line in held] == [0, 4, 8]
    assert {"trained_images", "images_per_second", "accuracy"} <= set(lines[1])
    for name in ("loss.png", "metrics.png", "calibration.png", "confusion.png"):
        assert (finished / name).read_bytes().startswith(b"\x89PNG")
    figures = json.loads((finished / "classes.json").read_text())
    assert figures["images"] == 15
    assert figures["accuracy"] == pytest.approx(held[-1]["eval_accuracy"])
    assert figures["loss"] == pytest.approx(held[-1]["eval_loss"], abs=1e-5)
    assert figures["accuracy"] == pytest.approx(np.mean([row["prediction"] == row["label"] for row in said(finished)]))
    wrong = sum(row["prediction"] != row["label"] for row in said(finished))
    assert (finished / "mistakes.html").read_text().count("<img") == wrong
    assert json.loads((finished / "labels.json").read_text()) == list(drawer().CLASSES)


def probabilities(model, folder: Path, files: list[str]) -> np.ndarray:
    import torch
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(folder, use_fast=False)
    pixels = processor([Image.open(file).convert("RGB") for file in files], return_tensors="pt")
    with torch.no_grad():
        return torch.softmax(model(**pixels).logits, -1).numpy()


def same_as_said(found: np.ndarray, names: dict[int, str], rows: list[dict]) -> None:
    for chances, row in zip(found, rows, strict=True):
        assert names[int(chances.argmax())] == row["prediction"]
        for name, chance in row["top"].items():
            number = next(n for n, other in names.items() if other == name)
            assert chances[number] == pytest.approx(chance, abs=1e-5)


def test_transformers_says_the_same_of_the_merged_folder(finished):
    from transformers import AutoModelForImageClassification

    model = AutoModelForImageClassification.from_pretrained(finished / "merged").eval()
    rows = said(finished)
    found = probabilities(model, finished / "merged", [row["image"] for row in rows])
    same_as_said(found, model.config.id2label, rows)
    assert model.config.label2id == {name: number for number, name in enumerate(drawer().CLASSES)}


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_peft_says_the_same_of_the_adapter(finished, base):
    from peft import PeftModel
    from transformers import AutoModelForImageClassification

    below = AutoModelForImageClassification.from_pretrained(base, num_labels=5, ignore_mismatched_sizes=True)
    model = PeftModel.from_pretrained(below, finished / "adapter").eval()
    names = dict(enumerate(json.loads((finished / "adapter" / "labels.json").read_text())))
    rows = said(finished)
    found = probabilities(model, finished / "adapter", [row["image"] for row in rows])
    same_as_said(found, names, rows)


def test_predict_says_the_same_and_goes_on_after_what_is_no_picture(finished, shapes, spawn, tmp_path):  # noqa: F811
    (tmp_path / "no.jpg").write_text("no picture")
    words = ["--model", str(finished / "merged"), "--out", str(tmp_path / "out.jsonl"), str(tmp_path / "no.jpg")]
    process = spawn("predict", *words, str(shapes / "held"))
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    assert "not read" in output
    found = {row["image"]: row for row in map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())}
    assert len(found) == 15
    for row in said(finished):
        assert found[row["image"]]["prediction"] == row["prediction"]
        assert found[row["image"]]["probability"] == pytest.approx(row["probability"], abs=1e-5)


def untimed(file: Path) -> list[dict]:
    return [{key: value for key, value in row.items() if key != "images_per_second"} for row in read_metrics(file)]


def test_a_killed_run_goes_on_with_more_workers_and_ends_bitwise_equal(finished, base, shapes, spawn, tmp_path):  # noqa: F811
    args = arguments(base, shapes, tmp_path / "run", train__save_every=1)
    process, metrics = spawn("classify", *args), tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 200
    steps = lambda: [row["step"] for row in read_metrics(metrics) if "loss" in row]
    while process.poll() is None and time.monotonic() < deadline and not steps():
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert 0 < max(steps()) < 8
    process = spawn("classify", *args, "--run.resume", "true", "--data.workers", "1")
    output, _ = process.communicate(timeout=280)
    assert process.returncode == 0, output
    assert untimed(metrics) == untimed(finished / "metrics.jsonl")
    for file in ("adapter/adapter_model.safetensors", "merged/model.safetensors", "predictions.jsonl"):
        assert (tmp_path / "run" / file).read_bytes() == (finished / file).read_bytes(), file


def test_what_cannot_be_is_refused_before_anything_is_learned(run_here, base, shapes, tmp_path):  # noqa: F811
    refused = lambda error, words, **more: _refused(
        run_here, arguments(base, shapes, tmp_path / "no", **more), error, words
    )
    refused(RunError, "reads texts, not images", model__path=jaxsft.BASE)
    refused(RunError, "init random needs tuning.method full", init="random")
    refused(RunError, "an image has none", model__new_tokens='["x"]')
    (tmp_path / "odd" / "zebra").mkdir(parents=True)
    Image.new("RGB", (9, 9)).save(tmp_path / "odd" / "zebra" / "1.png")
    refused(DataError, "label 'zebra' is none of the 5 classes", data__eval=tmp_path / "odd")
    refused(DataError, "has no row with an image", data__train=ROOT / "jaxsft/assets/quickstart/train.jsonl")


def _refused(run_here, args: list[str], error: type, words: str) -> None:  # noqa: F811
    with pytest.raises(error, match=words):
        run_here("classify", *args)


def test_a_plan_needs_no_picture_to_be_opened(run_here, base, shapes, tmp_path, capsys):  # noqa: F811
    run_here("classify", *arguments(base, shapes, tmp_path / "no", run__plan="true"))
    shown = capsys.readouterr().out
    assert "what one device needs" in shown
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("more", "changed"),
    [
        ({"tuning__method": "partial"}, lambda name: name.startswith("classifier")),
        ({"tuning__method": "partial", "tuning__layers": 1}, lambda name: "layer.1." in name or "classifier" in name),
    ],
    ids=["head", "last layer"],
)
def test_only_what_tuning_names_changes(more, changed, run_here, base, shapes, tmp_path):  # noqa: F811
    from safetensors.numpy import load_file

    args = arguments(base, shapes, tmp_path / "run", train__max_steps=2, train__eval_every=0, probe=0, **more)
    run_here("classify", *args, "--train.microbatches", "2", "--mesh.data", "4", "--mesh.fsdp", "2")
    old, new = (load_file(Path(folder) / "model.safetensors") for folder in (base, tmp_path / "run" / "merged"))
    assert old.keys() == new.keys()
    differs = {name for name in old if old[name].shape != new[name].shape or not np.array_equal(old[name], new[name])}
    assert differs == {name for name in old if changed(name)}
