"""Reward models: transformers' ...ForSequenceClassification with one label, read, made, merged, and adapted by PEFT."""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsft import hub, lora, models, score, tree
from jaxsft.hub.files import Reader
from jaxsft.lora import LoRA

from .pairs import CASES, GPT2, SHAPE, SIZE, documents, random_adapter, torch, transformers

peft = pytest.importorskip("peft")

pytestmark = [
    pytest.mark.parity,
    # PEFT asks transformers for a property that transformers renamed.
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*fan_in_fan_out.*"),
]
# Every family that has the class, tied and untied.
NAMES = [
    *("llama-mha-untied", "llama-gqa-tied", "mistral-window", "qwen2-tied", "qwen3-untied", "gemma-tied"),
    *("gemma2-windows", "gemma3-two-ropes", "olmo2-untied", "smollm3-windows", "phi3-untied", "gpt2-tied"),
    *("gpt2-untied-inner", "mixtral-untied", "qwen2-moe", "qwen3-moe-every-second", "gpt-oss"),
]
every = pytest.mark.parametrize("name", NAMES)
three = pytest.mark.parametrize("name", ["llama-gqa-tied", "qwen3-untied", "gpt2-tied"])
PAD = EOS = 2  # the same token, as in many a checkpoint
TEXTS = documents([5, 24, 1, 17, 9], seed=7)
for text in TEXTS:
    text[-1] = 3 if text[-1] == PAD else text[-1]  # transformers takes no last token that is its padding
TEXTS[1][10:12] = PAD  # and any other


class Judge(NamedTuple):
    """The same reward model on both sides."""

    folder: Path
    theirs: Any
    model: models.Model
    variables: dict


@pytest.fixture(scope="session")
def judges(tmp_path_factory):
    """name -> Judge, random, as transformers saved it."""
    made = {}

    def get(name: str) -> Judge:
        if name not in made:
            kind, options = CASES[name]
            ids = {"pad_token_id": PAD, "eos_token_id": EOS, "num_labels": 1}
            shape = {**(GPT2 if kind == "GPT2Config" else SHAPE), **options, **ids}
            config = getattr(transformers, kind)(**shape)
            theirs = transformers.AutoModelForSequenceClassification.from_config(config, attn_implementation="eager")
            generator, center = torch.Generator().manual_seed(sum(map(ord, name))), 0 if "gemma" in name else 1
            with torch.no_grad():
                for path, weight in theirs.named_parameters():
                    noise = torch.randn(weight.shape, generator=generator)
                    scales = "norm" in path or (".ln_" in path and "bias" not in path)
                    weight.copy_(center + 0.3 * noise if scales else SIZE * noise)
            folder = tmp_path_factory.mktemp(name)
            theirs.save_pretrained(folder)
            made[name] = Judge(folder, theirs.eval(), *hub.load_variables(str(folder)))
        return made[name]

    return get


def padded(side: str, fill: int = PAD) -> tuple[np.ndarray, np.ndarray]:
    """The texts as rows of one width, and where they are real."""
    tokens = np.full((len(TEXTS), 26), fill, np.int32)
    real = np.zeros(tokens.shape, bool)
    for row, here, text in zip(tokens, real, TEXTS, strict=True):
        at = slice(0, len(text)) if side == "right" else slice(len(row) - len(text), len(row))
        row[at], here[at] = text, True
    return tokens, real


def theirs(model, tokens: np.ndarray, real: np.ndarray | None = None) -> np.ndarray:
    """Scores [B] of a torch model. Positions are given, as GPT 2's do not begin with the text by themselves."""
    mask = np.ones_like(tokens) if real is None else real.astype(np.int32)
    positions = torch.tensor(np.maximum(mask.cumsum(1) - 1, 0), dtype=torch.long)
    with torch.no_grad():
        out = model(
            input_ids=torch.tensor(tokens, dtype=torch.long), attention_mask=torch.tensor(mask), position_ids=positions
        )
    return out.logits.float().numpy()[:, 0]


def alone(model) -> np.ndarray:
    """Scores of the texts, each by itself; without a token for padding transformers takes the last one there is."""
    return np.concatenate([theirs(model, text[None]) for text in TEXTS])


def load_torch(folder, **options) -> Any:
    """Reads a reward model with transformers and insists that it is complete."""
    model, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        str(folder), output_loading_info=True, attn_implementation="eager", **options
    )
    assert not any(info.values()), info
    assert model.config.num_labels == 1
    return model.eval()


def raw(folder) -> dict[str, tuple]:
    """Every tensor of a folder as dtype, shape and bytes."""
    reader = Reader(folder)
    return {n: (reader.dtype(n), reader.shape(n), reader.read(n).tobytes()) for n in reader.files}


rows = jax.jit(score.rows, static_argnums=0)


@every
def test_scores_are_those_of_transformers_wherever_the_padding_is(judges, name, difference):
    judge = judges(name)
    expected = alone(judge.theirs)
    assert expected.std() > 0.1
    assert difference("reward: scores of texts", score.texts(judge.model, judge.variables, TEXTS), expected) < 1e-4
    for side in ("left", "right"):
        tokens, real = padded(side)
        batch = theirs(judge.theirs, tokens, real)
        assert difference("reward: transformers, padded against alone", batch, expected) < 1e-4
        got = rows(judge.model, judge.variables, tokens, real)
        assert difference(f"reward: scores, padded {side}", got, batch) < 1e-4
        other = rows(judge.model, judge.variables, padded(side, fill=5)[0], real)
        assert difference("reward: scores, whatever pads", other, got) == 0


def of_language_model(pair, seed=1):
    """A reward model made of a language model, in which the score and a norm have moved."""
    model, variables = hub.load_variables(str(pair.folder), labels=1, key=jax.random.key(seed))
    params = variables["params"]
    trained = {
        "score": {"kernel": 5 * params["score"]["kernel"]},
        "norm": jax.tree.map(lambda x: 1.25 * x, params["norm"]),
    }
    return model, {**params, **trained}, trained


@every
def test_a_language_model_merges_into_what_transformers_scores_alike(pairs, name, tmp_path, difference):
    pair = pairs(name)
    model, params, trained = of_language_model(pair)
    spec = LoRA(rank=4, alpha=6.0, targets=".*/attn/.*")
    low = random_adapter(jax.random.key(2), lora.init(jax.random.key(1), params, spec), 0.15)
    hub.merge(str(pair.folder), str(tmp_path), adapter=low, trained=trained)
    merged = load_torch(tmp_path)
    assert type(merged).__name__ == pair.family.classifier
    expected, plain = alone(merged), alone(load_torch(merged_without(pair, trained, tmp_path / "plain")))
    assert np.abs(expected - plain).max() > 0.02  # the adapter is no whisper
    got = score.texts(model, {"params": params, "lora": low}, TEXTS)
    assert difference("reward: scores, merged", got, expected) < 1e-4
    again = score.texts(*hub.load_variables(str(tmp_path)), TEXTS)
    assert difference("reward: scores, merged and loaded here", again, expected) < 1e-4


def merged_without(pair, trained, folder) -> Path:
    """The same without an adapter: whatever did not train is the base's, byte for byte."""
    hub.merge(str(pair.folder), str(folder), trained=trained)
    base, new = raw(pair.folder), raw(folder)
    moved = {name for name in new if new[name] != base.get(name)}
    assert moved == {"score.weight", *(n for n in base if n.rpartition(".")[0] in ("model.norm", "transformer.ln_f"))}
    assert base.keys() - new.keys() == {"lm_head.weight"} & base.keys()
    return folder


@three
def test_a_config_of_ours_says_what_transformers_says(pairs, name, tmp_path):
    pair = pairs(name)
    hub.merge(str(pair.folder), str(tmp_path / "ours"), trained=of_language_model(pair)[2])
    made = transformers.AutoModelForSequenceClassification.from_pretrained(str(pair.folder), num_labels=1)
    made.save_pretrained(tmp_path / "theirs")
    ours, other = (json.loads((tmp_path / side / "config.json").read_text()) for side in ("ours", "theirs"))
    assert ours == other
    assert hub.read_config(tmp_path / "theirs")[1] == hub.read_config(tmp_path / "ours")[1]


@three
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_merged_reward_model_has_one_dtype_and_transformers_takes_it(pairs, name, dtype, tmp_path):
    pair = pairs(name)
    pair.fresh().to(getattr(torch, dtype)).save_pretrained(tmp_path / "base")
    trained = of_language_model(pair)[2]
    hub.merge(str(tmp_path / "base"), str(tmp_path / "merged"), trained=trained)
    model = load_torch(tmp_path / "merged", dtype="auto")
    assert {weight.dtype for weight in model.parameters()} == {getattr(torch, dtype)}
    kernel = torch.tensor(np.asarray(trained["score"]["kernel"])).T.to(getattr(torch, dtype))
    assert torch.equal(model.score.weight, kernel)  # rounded once


@pytest.mark.parametrize("name", ["llama-gqa-tied", "gpt2-tied"])
def test_a_reward_model_merges_into_itself_with_its_score_or_another(judges, name, tmp_path, difference):
    judge = judges(name)
    hub.merge(str(judge.folder), str(tmp_path / "same"))
    assert raw(tmp_path / "same") == raw(judge.folder)
    kernel = judge.variables["params"]["score"]["kernel"]
    hub.merge(str(judge.folder), str(tmp_path / "twice"), trained={"score": {"kernel": 2 * kernel}})
    assert (
        difference("reward: the score doubled", alone(load_torch(tmp_path / "twice")), 2 * alone(judge.theirs)) < 1e-5
    )


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_gpt_2_without_its_prefix_becomes_a_reward_model_too(pairs, prefix, tmp_path, difference):
    """The first checkpoints of GPT 2 are those of the base model."""
    pair = pairs("gpt2-tied")
    base = tmp_path / "base"
    (pair.fresh() if prefix else pair.fresh().transformer).save_pretrained(base)
    model, params, trained = of_language_model(pair._replace(folder=base))
    hub.merge(str(base), str(tmp_path / "merged"), trained=trained)
    got = score.texts(model, {"params": params}, TEXTS)
    assert difference("reward: GPT 2 by its names", got, alone(load_torch(tmp_path / "merged"))) < 1e-4


# ---- padding and tokenizers --------------------------------------------------------------------------------------

ASSETS = Path(hub.__file__).parents[1] / "assets" / "base"


@pytest.mark.parametrize("own", ["<|im_end|>", "<|endoftext|>", None])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_tokenizer_that_pads_with_its_eos_scores_whole_texts_after_a_merge(own, side, tmp_path, difference):
    """The whole of it, as a user would: text in, rows of transformers' own padding, scores out."""
    base = tmp_path / "base"
    shutil.copytree(ASSETS, base)
    for file, key, value in (("tokenizer_config", "pad_token", own), ("config", "pad_token_id", 2)):
        said = json.loads((base / f"{file}.json").read_text())
        (base / f"{file}.json").write_text(json.dumps(said | {key: value}))
    model, variables = hub.load_variables(str(base), labels=1, key=jax.random.key(0))
    hub.merge(str(base), str(tmp_path / "merged"), trained={"score": variables["params"]["score"]})
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "merged"), padding_side=side)
    merged = load_torch(tmp_path / "merged", dtype=torch.float32)
    assert tokenizer.pad_token_id == merged.config.pad_token_id not in (None, tokenizer.eos_token_id)
    texts = ["Why is the sky blue?", "Because", "It is a long story that begins with light and does not end there."]
    batch = tokenizer([text + "<|im_end|>" for text in texts], padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = merged(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0].numpy()
    ids = [tokenizer(text + "<|im_end|>")["input_ids"] for text in texts]
    rounded = jax.tree.map(lambda x: jnp.bfloat16(x).astype(jnp.float32), variables)  # as the base's files are
    assert difference("reward: text in, scores out", score.texts(model, rounded, ids), expected) < 1e-4


# ---- PEFT --------------------------------------------------------------------------------------------------------

SPEC = LoRA(rank=4, alpha=6.0)


def with_peft(theirs, folder):
    """The base with an adapter folder on it, every key of which must fit."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(theirs, str(folder))
    assert isinstance(model, peft.PeftModelForSequenceClassification)
    assert not [w for w in caught if "adapter keys" in str(w.message)]  # missing or unexpected
    return model.eval()


def fresh_torch(folder):
    """A reward model of a language model's folder in torch, its score new and random."""
    return transformers.AutoModelForSequenceClassification.from_pretrained(
        str(folder), num_labels=1, attn_implementation="eager"
    ).eval()


def merged_scores(base, adapter, folder) -> np.ndarray:
    hub.merge(str(base), str(folder), adapter=adapter.lora, trained=adapter.params)
    return alone(load_torch(folder))


@three
def test_our_adapter_of_a_reward_model_scores_alike_in_peft_and_back(pairs, name, tmp_path, difference):
    pair = pairs(name)
    model, params, trained = of_language_model(pair)
    low = random_adapter(jax.random.key(2), lora.init(jax.random.key(1), params, SPEC), 0.15)
    export = {"family": pair.family, "base": str(pair.folder)}
    hub.export_adapter(str(tmp_path / "adapter"), low, SPEC, trained=trained, **export)
    expected = alone(with_peft(fresh_torch(pair.folder), tmp_path / "adapter"))
    got = score.texts(model, {"params": params, "lora": low}, TEXTS)
    assert difference("reward: our adapter in PEFT", got, expected) < 1e-4
    # Over a language model's parameters, as `merge.py` reads it, and over those of the reward model.
    for base in (
        hub.on_disk(str(pair.folder)),
        hub.load_variables(str(pair.folder), labels=1, key=jax.random.key(9))[1]["params"],
    ):
        again = hub.load_adapter(str(tmp_path / "adapter"), base, family=pair.family, config=pair.model.config)
        assert tree.flat(again.params).keys() == tree.flat(trained).keys()
        assert all(np.array_equal(x, tree.flat(trained)[path]) for path, x in tree.flat(again.params).items())
    merged = merged_scores(pair.folder, again, tmp_path / "merged")
    assert difference("reward: our adapter, merged", merged, expected) < 1e-4
    with_peft(fresh_torch(pair.folder), tmp_path / "adapter").save_pretrained(str(tmp_path / "theirs"))
    back = hub.load_adapter(
        str(tmp_path / "theirs"), hub.on_disk(str(pair.folder)), family=pair.family, config=pair.model.config
    )
    assert all(np.array_equal(x, tree.flat(again.lora)[path]) for path, x in tree.flat(back.lora).items())


def their_adapter(theirs, **options):
    """A model of PEFT, everything that trains moved at random."""
    torch.manual_seed(5)
    options = {"r": 4, "lora_alpha": 6, "task_type": "SEQ_CLS", "target_modules": "all-linear", **options}
    model = peft.get_peft_model(theirs, peft.LoraConfig(**options)).eval()
    with torch.no_grad():
        for path, weight in model.named_parameters():
            if weight.requires_grad:
                weight += (0.1 if "lora_" in path else 0.3) * torch.randn(weight.shape)
    return model


# As PEFT has them by default; as TRL's documentation asks for them; with more than that.
THEIRS: dict[str, dict[str, Any]] = {
    "plain": {},
    "named": {"modules_to_save": ["score"]},
    "dora": {"use_dora": True},
    "embedding": {"modules_to_save": ["embed_tokens", "wte", "score"]},
}


@three
@pytest.mark.parametrize("kind", THEIRS)
def test_an_adapter_of_peft_scores_alike_here_merged_and_again_in_peft(pairs, name, kind, tmp_path, difference):
    pair = pairs(name)
    peft_model = their_adapter(fresh_torch(pair.folder), **THEIRS[kind])
    peft_model.save_pretrained(str(tmp_path / "adapter"))
    expected = alone(peft_model)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert "score" in config["modules_to_save"]
    model, variables = hub.load_variables(str(pair.folder), labels=1, key=jax.random.key(0))
    adapter = hub.load_adapter(str(tmp_path / "adapter"), variables["params"], family=pair.family, config=model.config)
    assert "head" not in adapter.params
    got = score.texts(model, jax.tree.map(jnp.asarray, lora.attach(variables["params"], adapter)), TEXTS)
    assert difference("reward: PEFT's adapter here", got, expected) < 1e-4
    merged = merged_scores(pair.folder, adapter, tmp_path / "merged")
    assert difference("reward: PEFT's adapter, merged", merged, expected) < 1e-4
    export = {"family": pair.family, "base": str(pair.folder), "trained": adapter.params}
    hub.export_adapter(str(tmp_path / "again"), adapter.lora, adapter.spec, **export)
    again = alone(with_peft(fresh_torch(pair.folder), tmp_path / "again"))
    assert difference("reward: PEFT's adapter through here", again, expected) < 1e-4


@three
def test_an_adapter_over_a_reward_model_whose_score_rested_scores_alike_in_peft(judges, name, tmp_path, difference):
    judge = judges(name)
    params, shape = judge.variables["params"], judge.model.config
    low = random_adapter(jax.random.key(2), lora.init(jax.random.key(1), params, SPEC), 0.15)
    family = models.FAMILIES[judge.theirs.config.model_type]
    hub.export_adapter(str(tmp_path), low, SPEC, family=family, base=str(judge.folder), config=shape)
    expected = alone(with_peft(load_torch(judge.folder), tmp_path))
    got = score.texts(judge.model, {"params": params, "lora": low}, TEXTS)
    assert difference("reward: our adapter, the score at rest, in PEFT", got, expected) < 1e-4
    again = hub.load_adapter(str(tmp_path), params, family=family, config=shape)
    np.testing.assert_array_equal(again.params["score"]["kernel"], params["score"]["kernel"])


def test_the_families_that_are_said_to_score_are_those_of_transformers():
    known = transformers.models.auto.modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
    for kind, family in models.FAMILIES.items():
        if family.task:  # a decoder
            assert family.classifier == known.get(kind, ""), kind
