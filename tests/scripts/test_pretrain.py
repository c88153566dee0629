import contextlib
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from jaxsft import hub
from jaxsft.data import DataError
from jaxsft.run import RunError, read_metrics

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
NAMED = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True))
BERT = {"model_type": "bert", "architectures": ["BertForMaskedLM"], "num_hidden_layers": 2, "num_attention_heads": 2}
BERT |= {"hidden_size": 32, "intermediate_size": 64, "max_position_embeddings": 32, "torch_dtype": "float32"}


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


# ---- encoders -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bert(texts, tmp_path_factory) -> Path:
    """A folder with a BERT's config and a tokenizer of word pieces, and no weights."""
    folder = tmp_path_factory.mktemp("bert")
    core = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    core.normalizer, core.decoder = normalizers.BertNormalizer(lowercase=True), decoders.WordPiece()
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    lines = [json.loads(line)["text"] for line in Path(texts).read_text(encoding="utf-8").splitlines()]
    trainer = trainers.WordPieceTrainer(vocab_size=40, special_tokens=SPECIAL, show_progress=False)
    core.train_from_iterator(lines, trainer)
    core.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    PreTrainedTokenizerFast(tokenizer_object=core, **NAMED).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(BERT | {"vocab_size": core.get_vocab_size()}))
    return folder


MASKED = ["--train.objective", "masked"]


@pytest.fixture(scope="module")
def learned(run_here, bert, texts, tmp_path_factory) -> Path:
    """The folder of a run that taught the BERT from random weights, with what it showed in shown.txt."""
    out = tmp_path_factory.mktemp("learned") / "run"
    more = [*MASKED, "--init", "random", "--train.epochs", "30", "--data.val_fraction", "0.2"]
    given = arguments(str(bert), texts, out, *more)
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        run_here("pretrain", *[value if value != "0" else "2" for value in given])  # run.samples
    (out / "shown.txt").write_text(shown.getvalue(), encoding="utf-8")
    return out


@pytest.mark.parity  # a long one
def test_an_encoder_learns_to_fill_in_and_what_it_leaves_loads(learned, bert):
    lines = read_metrics(learned / "metrics.jsonl")
    losses, held = ([line[name] for line in lines if name in line] for name in ("loss", "eval_loss"))
    size = json.loads((bert / "config.json").read_text())["vocab_size"]
    assert losses[0] == pytest.approx(np.log(size), abs=0.2)
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 1
    assert held[-1] < held[0] - 1
    model, params = hub.load(str(learned / "merged"))
    assert model.config.mlm
    assert np.abs(params["mlm"]["bias"]).max() > 0.01
    assert sorted(file.name for file in (learned / "merged").iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]  # and no chat template: nobody asks an encoder


def test_about_the_share_that_is_asked_for_is_hidden_each_step(learned, bert, texts):
    tokenizer = hub.load_tokenizer(str(bert))
    lines = [json.loads(line)["text"] for line in Path(texts).read_text(encoding="utf-8").splitlines()]
    count = sum(len(ids) - 2 for ids in tokenizer(lines)["input_ids"])  # of which a fifth of the rows is held out
    steps = [line["trained_tokens"] for line in read_metrics(learned / "metrics.jsonl") if "loss" in line]
    assert 0.12 < sum(steps) / (30 * count * 0.8) < 0.18


def test_people_see_gaps_and_how_they_were_filled_before_and_after(learned):
    shown = (learned / "shown.txt").read_text(encoding="utf-8")
    rows = shown.split("held-out questions")[1].split("result")[0].split("├")
    gaps, wanted, before, after = (
        "".join(line.split("│")[column].strip() + " " for line in rows[0].splitlines() if line.count("│") == 5)
        for column in (1, 2, 3, 4)
    )
    assert "[MASK]" in gaps
    count = wanted.count(",")
    assert before.count(",") == after.count(",") == count > 0
    assert before != after


@pytest.mark.parity  # a long one
def test_a_trained_encoder_goes_on_with_lora_and_whole_words(run_here, learned, texts, tmp_path):
    more = [*MASKED, "--tuning.method", "lora", "--train.whole_words", "true", "--train.max_steps", "2"]
    run_here("pretrain", *arguments(str(learned / "merged"), texts, tmp_path / "run", *more))
    settings = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert settings["task_type"] is None
    assert "bert.encoder.layer.0.attention.self.query" in settings["target_modules"]
    assert not (tmp_path / "run" / "adapter" / "chat_template.jinja").exists()
    before, after = (load_file(f"{folder}/merged/model.safetensors") for folder in (learned, tmp_path / "run"))
    changed = {
        name.rsplit(".", 1)[0].split(".layer.")[-1][2:] for name in before if (before[name] != after[name]).any()
    }
    dense = {f"attention.self.{name}" for name in ("query", "key", "value")} | {"attention.output.dense"}
    assert changed == dense | {"intermediate.dense", "output.dense"}
    run_here("merge", "--checkpoint", str(tmp_path / "run" / "checkpoints" / "2"), "--out", str(tmp_path / "again"))
    again, merged = (tmp_path / "again", tmp_path / "run" / "merged")
    assert {file.name: file.read_bytes() for file in again.iterdir()} == {
        file.name: file.read_bytes() for file in merged.iterdir()
    }


@pytest.mark.parity  # a long one
@pytest.mark.parametrize("start", ["pretrained", "random"])
def test_an_encoder_learns_new_tokens(run_here, learned, texts, tmp_path, start):
    own = tmp_path / "texts.jsonl"
    own.write_text(Path(texts).read_text().replace("lamp", "<Lamp>"))
    more = [*MASKED, "--init", start, "--model.new_tokens", '["<Lamp>"]', "--train.max_steps", "8"]
    run_here("pretrain", *arguments(str(learned / "merged"), str(own), tmp_path / "run", *more))
    before, after = (load_file(f"{folder}/merged/model.safetensors") for folder in (learned, tmp_path / "run"))
    size = len(before["cls.predictions.bias"])
    for name in ("bert.embeddings.word_embeddings.weight", "cls.predictions.bias"):
        assert len(after[name]) == size + 1
        assert np.abs(after[name][size] - before[name].mean(axis=0)).max() > 0.005
    assert json.loads((tmp_path / "run" / "merged" / "config.json").read_text())["vocab_size"] == size + 1
    assert size in hub.load_tokenizer(str(tmp_path / "run" / "merged"))("the <Lamp> was lit")["input_ids"]


def test_an_objective_that_the_model_cannot_have_is_refused_before_any_work(
    run_here, small, bert, learned, texts, tmp_path
):
    run = lambda model, *more: run_here("pretrain", *arguments(str(model), texts, tmp_path / "run", *more))
    with pytest.raises(ValueError, match="an encoder reads the next token before it predicts it"):
        run(learned / "merged")
    with pytest.raises(ValueError, match="train.objective masked is for encoders, and this model is a decoder"):
        run(small, *MASKED)
    with pytest.raises(RunError, match="train.whole_words is for train.objective masked; the objective is causal"):
        run(small, "--train.whole_words", "true")
    with pytest.raises(
        ValueError, match="data.max_length is 33, and the model has 32 positions; set data.max_length to 32"
    ):
        run(bert, *MASKED, "--data.max_length", "33")
    for new in (["--model.new_tokens", '["<a>"]'], ["--tuning.trainable", '["embed/table"]']):
        with pytest.raises(RunError, match="the embedding trains, which is the output layer of an encoder as well"):
            run(learned / "merged", *MASKED, "--tuning.method", "lora", *new)
    bare = shutil.copytree(bert, tmp_path / "bare")
    (bare / "config.json").write_text(json.dumps(BERT | {"vocab_size": 40, "architectures": ["BertModel"]}))
    with pytest.raises(ValueError, match="this encoder has no head that predicts masked tokens"):
        run(bare, *MASKED)
    maskless = shutil.copytree(bert, tmp_path / "maskless")
    settings = json.loads((bert / "tokenizer_config.json").read_text())
    (maskless / "tokenizer_config.json").write_text(
        json.dumps({k: v for k, v in settings.items() if k != "mask_token"})
    )
    with pytest.raises(DataError, match="the tokenizer has no mask_token"):
        run(maskless, *MASKED)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_sft_refuses_an_encoder(run_here, learned, rows, tmp_path):
    with pytest.raises(
        ValueError, match="an encoder reads the next token before it predicts it, .*masked, or choose a de"
    ):
        run_here("sft", *arguments(str(learned / "merged"), rows, tmp_path / "run"))
