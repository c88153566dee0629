"""Vectors and scores are those of sentence-transformers, over its folders, a model alone, static tables and pairs."""

import json
import random
import shutil
import string
from pathlib import Path

import numpy as np
import pytest

import jaxsft
from jaxsft import config, hub
from jaxsft.rag import embed, recipe, rerank, static
from jaxsft.run import read_metrics

from ..scripts.conftest import load_script
from .pairs import torch, transformers

sentences = pytest.importorskip("sentence_transformers")
modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")]
ASSETS = Path(jaxsft.BASE).parent
ODD = [
    "",
    " ",
    "\n\t",
    "请问你是谁",
    "灯塔图书馆在石阶的尽头。",
    "[SEP] [CLS] [UNK]",
    "naïve CAFÉ Ünïcode",
    "😀 🏮",
    "word " * 700,
]
SHAPE = {
    "vocab_size": 1024,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 130,
}


def texts(count: int, longest: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    word = lambda: "".join(draw.choices(string.ascii_letters + "éß人灯,.?!'", k=draw.randint(1, 9)))
    return [" ".join(word() for _ in range(draw.randint(1, longest))) for _ in range(count)] + ODD


def closeness(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The least cosine."""
    assert ours.dtype == np.float32
    assert np.linalg.norm(ours, axis=1) == pytest.approx(1, abs=1e-5)
    return float((ours * theirs / np.linalg.norm(theirs, axis=1, keepdims=True)).sum(axis=1).min())


def save(kind: str, folder: Path, seed: int = 0, **keys) -> Path:
    """A random model of transformers, large enough weights that texts differ, with the shipped encoder's tokenizer."""
    torch.manual_seed(seed)
    config = getattr(transformers, kind.partition("For")[0].removesuffix("Model") + "Config")(**SHAPE | keys)
    model = getattr(transformers, kind)(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    model.eval().save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(ASSETS / "encoder" / file, folder / file)
    return folder


def test_the_default_embedder_is_minilm(difference):
    given = texts(150, 20) + texts(3, 300, seed=1)
    theirs = sentences.SentenceTransformer(str(embed.default()), device="cpu").encode(given, batch_size=64)
    ours = embed.load().documents(given)
    assert closeness(ours, theirs) > 0.99999
    assert difference("vectors of MiniLM", ours, theirs) < 2e-6


@pytest.mark.parametrize("mode", recipe.FLAGS.values())
@pytest.mark.parametrize("kind", ["BertModel", "RobertaModel"])
def test_every_pooling_is_theirs(kind, mode, tmp_path, difference):
    ids = {"pad_token_id": 0} if kind == "RobertaModel" else {}
    base = save(kind, tmp_path / "base", **ids)
    stack = modules.Transformer(str(base), max_seq_length=40)
    pooling = modules.Pooling(stack.get_embedding_dimension(), mode)
    model = sentences.SentenceTransformer(modules=[stack, pooling, modules.Normalize()], device="cpu")
    model.save_pretrained(str(tmp_path / "saved"))
    given = texts(24, 60)
    ours, theirs = embed.load(str(tmp_path / "saved")).documents(given), model.encode(given)
    assert closeness(ours, theirs) > 0.99999
    assert difference(f"vectors, {mode}", ours, theirs) < 5e-6


def test_a_dense_layer_prompts_and_lower_case_are_theirs(tmp_path):
    base = save("BertModel", tmp_path / "base")
    stack = modules.Transformer(str(base), max_seq_length=64, do_lower_case=True)
    pooling = modules.Pooling(32, ("cls", "mean"), include_prompt=False)
    layers = [modules.Dense(64, 24), modules.Dense(24, 12, bias=False, activation_function=torch.nn.Identity())]
    prompts = {"query": "Represent this question: ", "passage": "a passage: "}
    model = sentences.SentenceTransformer(modules=[stack, pooling, *layers], prompts=prompts, device="cpu")
    model.save_pretrained(str(tmp_path / "saved"))
    ours, given = embed.load(str(tmp_path / "saved")), [text for text in texts(20, 40) if text.strip()]
    assert ours.dim == 12
    assert closeness(ours.queries(given), model.encode_query(given)) > 0.99999
    assert closeness(ours.documents(given), model.encode(given, prompt_name="passage")) > 0.99999


@pytest.mark.parametrize("mode", ["mean", "lasttoken"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_decoder_is_pooled_alike_whatever_side_is_padded(mode, side, tmp_path):
    base = save("Qwen3Model", tmp_path / "base", head_dim=8, num_key_value_heads=2, tie_word_embeddings=False)
    raw = json.loads((base / "tokenizer.json").read_text())  # like Qwen3-Embedding's: a token behind each text
    raw["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "[SEP]", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"[SEP]": {"id": "[SEP]", "ids": [3], "tokens": ["[SEP]"]}},
    }
    (base / "tokenizer.json").write_text(json.dumps(raw))
    stack = modules.Transformer(str(base), max_seq_length=48, processor_kwargs={"padding_side": side})
    model = sentences.SentenceTransformer(modules=[stack, modules.Pooling(32, mode)], device="cpu")
    model.save_pretrained(str(tmp_path / "saved"))
    given = texts(24, 60)
    assert closeness(embed.load(str(tmp_path / "saved")).documents(given), model.encode(given)) > 0.99999


def test_a_model_alone_is_pooled_as_they_pool_it(tmp_path):
    bert, writer = save("BertForMaskedLM", tmp_path / "bert"), save("LlamaForCausalLM", tmp_path / "llama")
    given = texts(12, 30)
    for folder, pooling in ((bert, ("mean",)), (writer, ("lasttoken",))):
        assert recipe.read(folder).pooling == pooling
        theirs = sentences.SentenceTransformer(str(folder), device="cpu").encode(given)
        assert closeness(embed.load(str(folder)).documents(given), theirs) > 0.99999


def test_a_static_embedding_is_theirs(tmp_path):
    from tokenizers import Tokenizer

    rows = np.random.default_rng(0).standard_normal((1024, 16)).astype(np.float32)
    table = modules.StaticEmbedding(Tokenizer.from_file(str(ASSETS / "encoder/tokenizer.json")), embedding_weights=rows)
    model = sentences.SentenceTransformer(modules=[table], device="cpu")
    model.save_pretrained(str(tmp_path))
    ours, given = embed.load(str(tmp_path)), [text for text in texts(40, 40) if text.strip()]
    assert closeness(ours.documents(given), model.encode(given)) > 0.99999
    assert not ours.documents([""]).any()


def test_a_model2vec_table_is_read_by_its_recipe():
    folder = Path(__file__).parents[3] / "shared/data/encoder_potion4m"
    if not folder.is_dir():
        pytest.skip("the table does not lie beside the repository")
    from tokenizers import Tokenizer

    tokenizer, rows = Tokenizer.from_file(str(folder / "tokenizer.json")), static.table(folder)
    ours, given = embed.load(str(folder)), [text for text in texts(40, 40) if text.strip()]
    for text, vector in zip(given, ours.documents(given), strict=True):
        ids = [i for i in tokenizer.encode(text, add_special_tokens=False).ids if i != tokenizer.token_to_id("[UNK]")]
        mean = np.stack([rows[i] for i in ids]).astype(np.float64).mean(axis=0) if ids else np.zeros(128)
        np.testing.assert_allclose(vector, mean / max(np.linalg.norm(mean), 1e-12), atol=1e-6)


@pytest.mark.parametrize(("kind", "typed"), [("Bert", True), ("Bert", False), ("Roberta", False)])
def test_a_cross_encoder_scores_as_theirs(kind, typed, tmp_path, difference):
    ids = {"pad_token_id": 0, "type_vocab_size": 1} if kind == "Roberta" else {}
    folder = save(f"{kind}ForSequenceClassification", tmp_path, num_labels=1, **ids)
    if typed:
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        settings["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    given, question = texts(30, 60), "Which lamp is green, and who lit it?"
    theirs = sentences.CrossEncoder(str(folder), device="cpu")
    ours = rerank.load(str(folder), batch_tokens=1024)
    pairs = [(question, text) for text in given]
    logits = theirs.predict(pairs, activation_fn=torch.nn.Identity())
    assert difference(f"scores of {kind}", ours.score(question, given), logits) < 2e-5
    np.testing.assert_allclose(rerank.probability(ours.score(question, given)), theirs.predict(pairs), atol=1e-5)
    assert np.ptp(logits) > 0.1
    exported = tmp_path / "exported"
    hub.export(str(exported), hub.load(str(folder))[1], source=str(folder))
    again = sentences.CrossEncoder(str(exported), device="cpu").predict(pairs, activation_fn=torch.nn.Identity())
    np.testing.assert_allclose(again, logits, atol=1e-6)


def rows(path: Path, count: int) -> str:
    """Questions that share a word with their passage and nothing else."""
    draw = random.Random(0)
    lines = []
    for _ in range(count):
        word = "".join(draw.choices("abcdefghij", k=6))
        passage = " ".join([*draw.choices(["the", "lamp", "is", "of", "harbour"], k=6), word])
        lines.append({"query": f"where is {word} ?", "positive": passage})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_what_the_script_leaves_makes_the_same_vectors_there(method, tmp_path, capsys):
    base, out = save("BertModel", tmp_path / "base"), tmp_path / "run"
    given = {
        "model.path": base,
        "data.train": rows(tmp_path / "rows.jsonl", 96),
        "data.val_fraction": 0.2,
        "tuning.method": method,
        "embed.pooling": "cls+mean",
        "embed.mine": 1,
        "train.batch_size": 16,
        "train.microbatches": 2,
        "train.epochs": 2,
        "optim.learning_rate": 0.002,
        "run.output_dir": out,
    }
    script = load_script("embed")
    script.main(config.parse(script.Config, [str(x) for key, value in given.items() for x in (f"--{key}", value)]))
    assert "recall@1" in capsys.readouterr().out
    losses = [line["eval_loss"] for line in read_metrics(out / "metrics.jsonl") if "eval_loss" in line]
    assert losses[-1] < losses[0]
    given = texts(20, 30)
    theirs = sentences.SentenceTransformer(str(out / "merged"), device="cpu").encode(given)
    ours = embed.load(str(out / "merged")).documents(given)
    assert closeness(ours, theirs) > 0.99999
    assert np.abs(ours - embed.load(str(base), pooling="cls+mean").documents(given)).max() > 1e-3
    assert (out / "adapter" / "adapter_config.json").is_file() == (method == "lora")
