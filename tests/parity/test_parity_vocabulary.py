"""New tokens: the folders that we write in transformers and PEFT, and PEFT's own here."""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

import jaxsft
from jaxsft import hub, lora, models, tree
from jaxsft.hub import Vocabulary
from jaxsft.models import Model
from jaxsft.tree import Tree

from .pairs import GPT2, SHAPE, SIZE, load_torch, ours, theirs, torch, transformers

peft = pytest.importorskip("peft")

pytestmark = [
    pytest.mark.parity,
    # PEFT asks transformers for a property that transformers renamed.
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    # PEFT says what it does with tied and with resized embeddings; that is what we ask for.
    pytest.mark.filterwarnings("ignore:.*(tie_word_embeddings|tied|save_embedding_layers|no longer tied).*"),
    pytest.mark.filterwarnings("ignore:.*fan_in_fan_out.*"),
]
WORDS, NEW = 2560, ["<sum>", "<diff>", " unbreakable"]  # tokens of the shipped tokenizer, and ours
FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
TEXT = "the<sum> of 1 and 2<|tool|> is unbreakable <diff>."
SPEC = lora.LoRA(4, 6.0)
# name: (config class, what differs from SHAPE, rows that no token has)
BASES: dict[str, tuple[str, dict[str, Any], int]] = {
    "llama untied": ("LlamaConfig", {}, 0),
    "qwen3 tied, padded": ("Qwen3Config", {"head_dim": 16, "tie_word_embeddings": True}, 40),
    "qwen2 untied, padded by less": ("Qwen2Config", {}, 2),
    "gpt2": ("GPT2Config", {}, 0),
    "gemma": ("GemmaConfig", {"head_dim": 16}, 0),
}


class Grown(NamedTuple):
    folder: Path  # of the base, with a tokenizer
    tokenizer: Any  # with the new tokens
    model: Model
    params: Tree  # with their rows
    vocabulary: Vocabulary

    @property
    def family(self):
        return hub.read_config(self.folder)[0]

    @property
    def tokens(self) -> np.ndarray:
        return np.array([self.tokenizer(TEXT)["input_ids"]])

    def resized(self) -> Any:
        """The base in torch, its tables as long as the tokenizer where they were shorter."""
        model = load_torch(self.folder)
        if len(self.tokenizer) > model.get_input_embeddings().num_embeddings:
            model.resize_token_embeddings(len(self.tokenizer), mean_resizing=False)
        return model


def randomise(model: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            scales = "norm" in name or (".ln_" in name and "bias" not in name)
            weight.copy_(scales + (0.3 if scales else SIZE) * torch.randn(weight.shape, generator=generator))


@pytest.fixture(scope="module", params=BASES)
def grown(request, tmp_path_factory) -> Grown:
    kind, options, spare = BASES[request.param]
    config = getattr(transformers, kind)(
        **{**(GPT2 if kind == "GPT2Config" else SHAPE), **options, "vocab_size": WORDS + spare}
    )
    model, folder = transformers.AutoModelForCausalLM.from_config(config), tmp_path_factory.mktemp("base")
    randomise(model)
    model.save_pretrained(folder)
    for file in FILES:
        if (Path(jaxsft.BASE) / file).is_file():
            shutil.copyfile(Path(jaxsft.BASE) / file, folder / file)
    tokenizer, vocabulary = hub.load_vocabulary(str(folder), NEW, special=["<|tool|>"])
    assert vocabulary is not None
    return Grown(folder, tokenizer, *hub.load(str(folder), vocabulary=vocabulary), vocabulary)


@pytest.fixture
def trained(grown) -> tuple[Tree, Tree]:
    """(an adapter, the tables) as if they had trained: everything that learns is moved at random."""
    move = lambda tree_, size: jax.tree.map(
        lambda x, key: np.asarray(x + size * jax.random.normal(key, x.shape)),
        tree_,
        jax.tree.unflatten(
            jax.tree.structure(tree_), list(jax.random.split(jax.random.key(3), len(jax.tree.leaves(tree_))))
        ),
    )
    low, rest = tree.partition(lora.init(jax.random.key(1), grown.params, SPEC), ".*/(a|b)")
    return tree.combine(move(low, 0.1), rest), move(tree.partition(grown.params, models.TABLES)[0], 0.05)


def same_ids(folder: Path, tokenizer: Any) -> None:
    found = transformers.AutoTokenizer.from_pretrained(folder)
    assert found.get_vocab() == tokenizer.get_vocab()
    assert found(TEXT)["input_ids"] == tokenizer(TEXT)["input_ids"]
    assert found(TEXT)["input_ids"].count(WORDS) == 1


def test_new_rows_are_those_that_transformers_would_draw(grown, difference):
    """It draws from a normal distribution around the mean, with the covariance times 1e-9."""
    if hub.read_config(grown.folder)[1].vocab_size > WORDS:
        pytest.skip("the tables are padded, and transformers takes padding for rows that were learned")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = load_torch(grown.folder)
        model.resize_token_embeddings(len(grown.tokenizer), mean_resizing=True)
    found = model.get_input_embeddings().weight.detach().numpy()
    assert difference("vocabulary: new rows", grown.params["embed"]["table"], found) < 1e-4


def test_the_merged_folder_gives_the_same_ids_and_logits_in_transformers(grown, trained, tmp_path, difference):
    low, tables = trained
    hub.merge(str(grown.folder), str(tmp_path), adapter=low, trained=tables)
    hub.save_tokens(tmp_path, grown.tokenizer, str(grown.folder))
    same_ids(tmp_path, grown.tokenizer)
    merged = load_torch(tmp_path)
    assert merged.config.vocab_size == grown.vocabulary.size
    variables = {"params": tree.nest(tree.flat(grown.params) | tree.flat(tables)), "lora": low}
    got = ours(grown.model, variables, grown.tokens)
    assert difference("vocabulary: logits, merged, in transformers", theirs(merged, grown.tokens), got) < 1e-4
    model, params = hub.load(str(tmp_path))
    assert difference("vocabulary: logits, merged here", ours(model, {"params": params}, grown.tokens), got) < 1e-4


def test_the_adapter_folder_gives_the_same_logits_in_peft_and_back(grown, trained, tmp_path, difference):
    low, tables = trained
    how = {"family": grown.family, "base": str(grown.folder), "trained": tables}
    hub.export_adapter(str(tmp_path), low, SPEC, **how)
    hub.save_tokens(tmp_path, grown.tokenizer, str(grown.folder))
    same_ids(tmp_path, grown.tokenizer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(grown.resized(), str(tmp_path)).eval()
    assert not [w for w in caught if "adapter keys" in str(w.message)]  # missing or unexpected
    variables = {"params": tree.nest(tree.flat(grown.params) | tree.flat(tables)), "lora": low}
    got = ours(grown.model, variables, grown.tokens)
    assert difference("vocabulary: logits, ours in PEFT", theirs(model, grown.tokens), got) < 1e-4

    base, params = hub.load(str(grown.folder))
    adapter = hub.load_adapter(str(tmp_path), params, family=grown.family, config=base.config)
    again = ours(base, lora.attach(params, adapter), grown.tokens)
    assert difference("vocabulary: logits, ours loaded back", again, got) < 2e-5


# Ways to train new tokens in PEFT, by the options of LoraConfig; the names are those of Llama's modules.
PEFT: dict[str, dict[str, Any]] = {
    "resized alone": {},
    "saved": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "saved and tied": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "parted": {"modules_to_save": ["embed_tokens"]},
    "adapted": {"target_modules": ["q_proj", "embed_tokens"]},
    "adapted, both": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "some rows": {"trainable_token_indices": [7, WORDS, WORDS + 2]},
    "some rows of both": {"trainable_token_indices": {"embed_tokens": [7, WORDS], "lm_head": [WORDS + 1, 9]}},
}

GPT2_NAMES = {"embed_tokens": "wte", "q_proj": "c_attn", "down_proj": "c_proj"}


@pytest.mark.parametrize("kind", PEFT)
def test_a_folder_of_peft_with_resized_tables_gives_the_same_logits_here_and_merged(grown, kind, tmp_path, difference):
    options = json.dumps({"target_modules": ["q_proj", "down_proj"], **PEFT[kind]})
    for name, other in GPT2_NAMES.items() if grown.family is models.FAMILIES["gpt2"] else ():
        options = options.replace(name, other)
    tied = grown.model.config.tied
    if tied and kind == "some rows of both":
        pytest.skip("PEFT wants the same tokens of tied tables")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False, **json.loads(options))
    model = peft.get_peft_model(grown.resized(), config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            # Without modules_to_save PEFT writes resized tables as they are; they may have been trained by other means.
            table = kind == "resized alone" and name.endswith(("embed_tokens.weight", "wte.weight", "lm_head.weight"))
            if (table and len(weight) == WORDS + 4) or "modules_to_save" in name or "trainable_tokens" in name:
                weight.add_(0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(name))))
    model.eval().save_pretrained(tmp_path / "adapter")
    read = lambda: hub.load_adapter(
        str(tmp_path / "adapter"), hub.on_disk(str(grown.folder)), family=grown.family, config=base.config
    )
    base, params = hub.load(str(grown.folder))
    if kind == "saved and tied" and "wte" in options:  # PEFT writes that it ties GPT 2's tables, and parts them
        with pytest.raises(hub.CheckpointError, match="has two tables, though adapter_config.json sets ensure_weight_"):
            read()
        return
    if kind == "adapted" and not tied and base.config.vocab_size < len(grown.tokenizer):  # PEFT leaves out the head
        with pytest.raises(hub.CheckpointError, match="and no head/table, which needs as many; PEFT writes it with"):
            read()
        return
    expected = theirs(model, grown.tokens)
    adapter = read()
    got = ours(base, lora.attach(params, adapter), grown.tokens)
    assert difference("vocabulary: logits, PEFT's here", got, expected) < 1e-4
    hub.merge(str(grown.folder), str(tmp_path / "merged"), adapter=adapter.lora, trained=adapter.params)
    merged = theirs(load_torch(tmp_path / "merged"), grown.tokens)
    assert difference("vocabulary: logits, PEFT's merged", merged, expected) < 1e-4


@pytest.mark.parametrize("kind", ["BertForMaskedLM", "RobertaForMaskedLM"])
def test_a_merged_encoder_gives_the_same_scores_in_transformers(kind, tmp_path, difference):
    cls = getattr(transformers, kind)
    size = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = cls(cls.config_class(vocab_size=96, max_position_embeddings=64, **size)).eval()
    randomise(model)
    model.save_pretrained(tmp_path / "base")
    vocabulary = Vocabulary(99, np.arange(96), np.arange(96, 99))
    mine, params = hub.load(str(tmp_path / "base"), vocabulary=vocabulary)
    noisy = lambda x: np.asarray(x) + np.float32(0.05) * np.random.default_rng(0).normal(size=x.shape).astype("f")
    trained = jax.tree.map(noisy, tree.partition(params, models.TABLES)[0])
    hub.merge(str(tmp_path / "base"), str(tmp_path / "merged"), trained=trained)
    again, info = cls.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info.values()), info
    tokens = np.arange(2, 34)[None] * 3 % 97 + 2  # the new ones among them
    variables = {"params": tree.nest(tree.flat(params) | tree.flat(trained))}
    expected = again.eval()(torch.tensor(tokens)).logits.detach().numpy()
    assert difference("vocabulary: scores of encoders", ours(mine, variables, tokens), expected) < 1e-4
