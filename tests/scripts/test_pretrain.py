import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxsft import hub
from jaxsft.run import RunError, read_metrics


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> str:
    file = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    lines = [{"text": f"The lamp was lit {n} times. " * (1 + n % 7)} for n in range(40)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return str(file)


def arguments(model, texts, out, *more) -> list[str]:
    given = ["--model.path", model, "--data.train", texts, "--data.max_length", "32", "--run.output_dir", str(out)]
    return [*given, "--optim.learning_rate", "0.01", "--train.batch_size", "8", "--run.samples", "0", *more]


def test_an_epoch_learns_every_token_of_the_corpus_once(run_here, small, texts, tmp_path):
    run_here("pretrain", *arguments(small, texts, tmp_path / "run"))
    tokenizer = hub.load_tokenizer(small)
    count = 0
    for line in Path(texts).read_text(encoding="utf-8").splitlines():  # each token, and the one that ends the text
        count += len(tokenizer(json.loads(line)["text"], add_special_tokens=False)["input_ids"]) + 1
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert sum(line["trained_tokens"] for line in lines) == count
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_random_weights_start_at_the_uniform_loss_and_export(run_here, small, texts, tmp_path):
    run_here("pretrain", *arguments(small, texts, tmp_path / "run", "--init", "random", "--train.max_steps", "2"))
    first = read_metrics(tmp_path / "run" / "metrics.jsonl")[0]["loss"]
    assert first == pytest.approx(np.log(2560), abs=0.1)
    old, new = (load_file(f"{folder}/model.safetensors") for folder in (small, tmp_path / "run" / "merged"))
    assert {name: x.shape for name, x in old.items()} == {name: x.shape for name, x in new.items()}
    hub.load(str(tmp_path / "run" / "merged"))


def test_random_weights_must_all_learn(run_here, small, texts, tmp_path):
    with pytest.raises(RunError, match="init random needs tuning.method full, not lora"):
        run_here("pretrain", *arguments(small, texts, tmp_path, "--init", "random", "--tuning.method", "lora"))
    with pytest.raises(RunError, match="init random needs model.quantise none, not nf4"):
        run_here("pretrain", *arguments(small, texts, tmp_path, "--init", "random", "--model.quantise", "nf4"))
