import json
import shutil
from pathlib import Path

import jax
import pytest

from jaxsft import data, hub, lora, models, predictions, sample
from jaxsft.run import RunError
from jaxsft.sample import Draw


@pytest.fixture(scope="module")
def asked(small, rows):
    """Four rows of the data, what the model reads of them, and a few keys of the script."""
    lines = [json.loads(line) for line in Path(rows).read_text(encoding="utf-8").splitlines()[:4]]
    tokenizer = hub.load_tokenizer(small)
    prompts = [data.prompt_ids([data.Message("user", line["instruction"])], tokenizer) for line in lines]
    given = ["--model", small, "--data.train", json.dumps([{"path": rows, "max_rows": 4}]), "--slots", "3"]
    given += ["--queue", "2", "--samples", "2", "--sample.max_new_tokens", "5", "--sample.temperature", "0.9"]
    return lines, prompts, tokenizer, [*given, "--sample.stop", '["ed"]', "--sample.seed", "7"]


@pytest.fixture(scope="module")
def expected(asked, small):
    """The rows that one call of `generate` gives."""
    lines, prompts, tokenizer, _ = asked
    model, params = hub.load(small)
    how = {"max_new_tokens": 5, "draw": Draw(0.9), "key": jax.random.key(7), "samples": 2}
    how |= {"stop": hub.stop_tokens(small, tokenizer), "strings": sample.stops.compile(["ed"], tokenizer)}
    texts = sample.texts(sample.generate(model, {"params": params}, prompts, **how), tokenizer, ["ed"])
    made = [predictions.Prediction(tokenizer.decode(prompts[i // 2]), text, "") for i, text in enumerate(texts)]
    return [row._replace(label=lines[i // 2]["output"]) for i, row in enumerate(made)]


@pytest.fixture(scope="module")
def answered(run_here, asked, tmp_path_factory):
    """The folder of a whole run."""
    folder = tmp_path_factory.mktemp("answers")
    run_here("generate", *asked[3], "--run.output_dir", str(folder))
    return folder


def test_every_row_is_asked_as_often_as_wanted_and_its_answer_stands_beside_what_was_wanted(answered, expected):
    assert predictions.read(answered) == expected
    assert len({row.predict for row in expected}) > 5
    lines = [json.loads(line) for line in (answered / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]


def test_a_run_that_was_cut_goes_on_where_it_ended_and_asks_nothing_again(
    run_here, asked, answered, expected, tmp_path, monkeypatch, capsys
):
    shutil.copytree(answered, tmp_path, dirs_exist_ok=True)
    file, given = tmp_path / predictions.FILE, [*asked[3], "--run.output_dir", str(tmp_path)]
    cut = file.read_text(encoding="utf-8").splitlines(keepends=True)[:5]  # two prompts, and half of the third one
    file.write_text("".join(cut) + '{"prompt": "ha', encoding="utf-8")
    seen, generate = [], sample.generate
    monkeypatch.setattr(sample, "generate", lambda *args, **how: seen.append(len(args[2])) or generate(*args, **how))
    with pytest.raises(RunError, match="holds another run; continue it with --run.resume true"):
        run_here("generate", *given)
    run_here("generate", *given, "--run.resume", "true", "--slots", "9")
    assert predictions.read(tmp_path) == expected
    assert seen == [2]
    assert "some of the answers" in capsys.readouterr().out
    with pytest.raises(RunError, match=r"were written with sample.seed 7, and now it is 8"):
        run_here("generate", *given, "--run.resume", "true", "--sample.seed", "8")


def test_an_adapter_answers_on_a_mesh(run_here, small, rows, tmp_path, monkeypatch):
    low = lora.init(jax.random.key(0), hub.on_disk(small), lora.LoRA(rank=2))
    low = jax.tree.map(lambda x: x + 0.3, low)
    folder = str(tmp_path / "adapter")
    hub.export_adapter(folder, low, lora.LoRA(rank=2), family=models.FAMILIES["llama"], base=small)
    seen = []
    answer = sample.Samples(*(jax.numpy.zeros(shape, int) for shape in ((3, 4), (3, 4), (3,), (3,))))
    monkeypatch.setattr(sample, "generate", lambda _, variables, *__, **___: seen.append(variables) or answer)
    given = ["--data.train", json.dumps([{"path": rows, "max_rows": 3}]), "--run.output_dir", str(tmp_path / "out")]
    run_here("generate", "--model", small, "--adapter", folder, *given, "--mesh.fsdp", "4", "--mesh.tensor", "2")
    leaves = jax.tree.leaves(seen[0]["lora"])
    assert {len(x.sharding.device_set) for x in leaves} == {8}
    assert any(not x.sharding.is_fully_replicated for x in leaves)


def test_what_cannot_be_asked_is_told_before_anything_is(run_here, small, rows, tmp_path):
    given = ["--model", small, "--data.train", rows, "--run.output_dir", str(tmp_path)]
    with pytest.raises(RunError, match="samples, slots and queue are 0, 64 and 256; 1 is the least"):
        run_here("generate", *given, "--samples", "0")
    with pytest.raises(ValueError, match="new ones exceed the model's"):
        run_here("generate", *given, "--sample.max_new_tokens", "100000")
    assert not (tmp_path / predictions.FILE).exists()
