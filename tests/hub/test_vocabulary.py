"""New tokens: their ids, their rows in tables of any length, and the files of a folder that has them."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from jaxsft import data, hub, lora, sample, sharding, tree
from jaxsft import models as families
from jaxsft.hub import CheckpointError, Vocabulary

WORDS = 2560  # tokens of the shipped tokenizer
NEW = ["<sum>", "<diff>", " unbreakable"]


@pytest.fixture(scope="module")
def exact(tiny):
    """As many rows as tokens."""
    return tiny("llama", tokenizer=True)


@pytest.fixture(scope="module")
def padded(tiny):
    """Forty rows that no token has, tied."""
    return tiny("qwen2", tied=True, tokenizer=True, vocab_size=WORDS + 40)


# ---- ids ------------------------------------------------------------------------------------------------------------


def test_a_token_has_the_id_behind_the_tokenizers_last_one_whatever_rows_there_are(exact, padded):
    for folder, size in ((exact, WORDS + 4), (padded, WORDS + 40)):
        tokenizer, vocabulary = hub.load_vocabulary(str(folder), NEW, special=["<|tool|>"])
        assert vocabulary.size == size
        assert vocabulary.new.tolist() == [WORDS, WORDS + 1, WORDS + 2, WORDS + 3]
        assert tokenizer.convert_tokens_to_ids([*NEW, "<|tool|>"]) == vocabulary.new.tolist()
        np.testing.assert_array_equal(vocabulary.known, np.arange(WORDS))


def test_without_new_tokens_nothing_changes(exact):
    tokenizer, vocabulary = hub.load_vocabulary(str(exact))
    assert vocabulary is None
    assert tokenizer.get_vocab() == hub.load_tokenizer(str(exact)).get_vocab()


@pytest.mark.parametrize(("tokens", "size"), [(1, 2624), (40, 2600), (41, 2624), (65, 2688)])
def test_tables_grow_to_a_multiple_and_only_where_they_must(exact, padded, tokens, size):
    folder = exact if tokens in (1, 65) else padded
    given = [f"<{n}>" for n in range(tokens)]
    assert hub.load_vocabulary(str(folder), given, multiple=64)[1].size == size


@pytest.mark.parametrize(
    ("tokens", "special", "message"),
    [
        ([""], [], "the 1. of the new tokens is empty; leave it out"),
        (["<a>", "<b>", "<a>"], [], "the new token '<a>' is given twice"),
        (["<a>"], ["<a>"], "the new token '<a>' is given twice; give it once, among new_tokens or new_special_tokens"),
        (
            ["the"],
            [],
            r"the new token 'the' is token \d+ of the tokenizer already; leave it out.*has embed/table",
        ),
        ([], ["<|im_end|>"], "the new token '<|im_end|>' is token 2 of .* already"),
        ([], [" <x>"], "the new token ' <x>' is special and has white space around it"),
    ],
)
def test_what_cannot_be_a_new_token_is_refused(exact, tokens, special, message):
    with pytest.raises(CheckpointError, match=message.replace("|", r"\|")):
        hub.load_vocabulary(str(exact), tokens, special=special)


def test_a_multiple_of_no_rows_is_refused(exact):
    with pytest.raises(CheckpointError, match="a multiple of 0 rows; give vocab_multiple 1 or more"):
        hub.load_vocabulary(str(exact), NEW, multiple=0)


def test_a_token_that_the_tokenizer_has_and_the_model_has_no_row_for_may_be_given(tiny):
    """As where a [PAD] was put into a tokenizer and the tables were left as they were."""
    folder = tiny("llama", tokenizer=True, vocab_size=WORDS - 1)
    last = hub.load_tokenizer(str(folder)).convert_ids_to_tokens(WORDS - 1)
    tokenizer, vocabulary = hub.load_vocabulary(str(folder), [last])
    assert (vocabulary.size, vocabulary.new.tolist(), len(vocabulary.known)) == (WORDS, [WORDS - 1], WORDS - 1)
    assert len(tokenizer) == WORDS


# ---- text -----------------------------------------------------------------------------------------------------------


def test_a_new_token_is_one_token_in_text_and_a_special_one_in_the_template_alone(exact):
    tokenizer, vocabulary = hub.load_vocabulary(str(exact), ["<sum>"], special=["<|tool|>"])
    plain, special = vocabulary.new.tolist()
    tokenizer.chat_template = tokenizer.chat_template.replace("assistant", "<|tool|>")
    turns = data.Message("user", "1<sum>2 and <|tool|>"), data.Message("assistant", "the<sum>.")
    prompt = data.prompt_ids(turns[:1], tokenizer)
    assert (prompt.count(plain), prompt.count(special)) == (1, 1)
    assert prompt.index(plain) < prompt.index(special)  # in the message it is spelled, in the generation prompt written
    example = data.render(data.Conversation(turns), tokenizer)
    assert example.ids[example.mask].tolist().count(plain) == 1
    assert tokenizer.decode([plain, special], skip_special_tokens=True) == "<sum>"
    obeyed = data.render(data.Conversation(turns), tokenizer, data.How(control=True))
    assert obeyed.ids.tolist().count(special) == example.ids.tolist().count(special) + 1


def test_new_tokens_are_found_in_text_as_it_is_written_whatever_the_normalizer_does(tmp_path, tiny):
    """Llama 2's puts a blank before the text, and BERT's makes it lower case; a token's own text stays what it is."""
    for normalizer in (normalizers.Prepend("▁"), normalizers.Lowercase()):
        folder = Path(shutil.copytree(tiny("llama"), tmp_path / type(normalizer).__name__))
        core = Tokenizer(models.WordLevel({"?": 0, "</s>": 1, "a": 2, "▁a": 3}, "?"))
        core.normalizer, core.pre_tokenizer = normalizer, pre_tokenizers.Whitespace()
        PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>").save_pretrained(folder)
        tokenizer, _ = hub.load_vocabulary(str(folder), ["<Sum>"])
        assert tokenizer("a<Sum>a<sum>", add_special_tokens=False)["input_ids"].count(4) == 1


def test_the_cache_of_tokenised_data_knows_new_tokens(exact, tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "1<sum>2"}))
    config = data.Config(train=str(tmp_path / "a.jsonl"), cache=str(tmp_path / "cache"), max_length=32)
    ids = []
    for tokens in ([], ["<sum>"], ["<sum>"]):
        tokenizer, _ = hub.load_vocabulary(str(exact), tokens)
        rows, _, report = data.load(config, tokenizer)
        ids.append((rows[0].tokens.tolist(), report.cached))
    assert WORDS not in ids[0][0]
    assert ids[1][0].count(WORDS) == 1
    assert ids[2] == (ids[1][0], True)


def test_a_special_token_is_never_put_into_a_gap(exact):
    tokenizer, vocabulary = hub.load_vocabulary(str(exact), ["<sum>"], special=["<|tool|>", "<mask>"])
    tokenizer.mask_token = "<mask>"
    ordinary = set(data.masking(tokenizer).ordinary.tolist())
    assert ordinary & set(vocabulary.new.tolist()) == {vocabulary.new[0]}


# ---- rows -----------------------------------------------------------------------------------------------------------

TABLES = {  # of each family: its tensors with a row for each token, and our names of them
    "llama": {"model.embed_tokens.weight": "embed/table", "lm_head.weight": "head/table"},
    "gemma": {"model.embed_tokens.weight": "embed/table"},
    "gpt2": {"transformer.wte.weight": "embed/table"},
    "bert": {"bert.embeddings.word_embeddings.weight": "embed/table", "cls.predictions.bias": "mlm/bias"},
    "roberta": {"roberta.embeddings.word_embeddings.weight": "embed/table", "lm_head.bias": "mlm/bias"},
}


@pytest.mark.parametrize("spare", [0, 2, 7], ids=["exact", "padded", "padded beyond"])
@pytest.mark.parametrize("family", TABLES)
def test_new_rows_are_the_mean_of_those_of_the_tokens_and_the_others_stay(tiny, family, spare):
    folder = tiny(family, tied=family not in ("llama",), vocab_size=96 + spare)
    vocabulary = Vocabulary(max(96 + 4, 96 + spare), np.arange(96), np.arange(96, 100))
    _, params = hub.load(str(folder), vocabulary=vocabulary)
    _, before = hub.load(str(folder))
    found, stored = tree.flat(params), load_file(folder / "model.safetensors")
    for name, path in TABLES[family].items():
        old, new = stored[name].astype(np.float64), np.asarray(found.pop(path))
        assert new.shape == (max(100, 96 + spare), *old.shape[1:])
        np.testing.assert_array_equal(new[:96], stored[name][:96])
        np.testing.assert_array_equal(new[96:100], np.repeat(old[:96].mean(0, keepdims=True).astype("f"), 4, axis=0))
        np.testing.assert_array_equal(new[100:], stored[name][100:])
    for path, x in found.items():
        np.testing.assert_array_equal(x, tree.flat(before)[path])


def test_a_new_token_takes_no_more_than_its_share_and_leaves_the_others_as_they_were(exact):
    """exp(mean) <= mean(exp), and the scores of the others are the same."""
    _, vocabulary = hub.load_vocabulary(str(exact), NEW)
    (model, old), (grown, new) = hub.load(str(exact)), hub.load(str(exact), vocabulary=vocabulary)
    tokens = np.arange(24, dtype=np.int32)[None] * 101 % WORDS
    scores = [
        families.logits(m, {"params": p}, m.features({"params": p}, tokens)) for m, p in ((model, old), (grown, new))
    ]
    np.testing.assert_allclose(scores[1][..., :WORDS], scores[0], atol=1e-5)
    assert jax.nn.softmax(scores[1])[..., WORDS:].max() <= 1 / WORDS


def test_what_trains_is_float32_and_the_mean_is_that_of_the_files(tiny):
    folder = tiny("llama", dtype="bfloat16")
    vocabulary = Vocabulary(98, np.arange(96), np.arange(96, 98))
    how = {"dtype": jnp.bfloat16, "full_precision": "params/embed/table", "vocabulary": vocabulary}
    _, params = hub.load(str(folder), **how)
    stored = load_file(folder / "model.safetensors")
    mean = stored["model.embed_tokens.weight"].astype(np.float64).mean(0).astype(np.float32)
    np.testing.assert_array_equal(params["embed"]["table"][96], mean)
    assert params["head"]["table"].dtype == jnp.bfloat16
    head = stored["lm_head.weight"].astype(np.float64).mean(0).astype(np.float32).astype(jnp.bfloat16)
    np.testing.assert_array_equal(params["head"]["table"][97], head)


@pytest.mark.parametrize("size", [98, 99, 104])
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_mesh_gives_the_same_rows_whether_or_not_it_divides_them(tiny, family, size):
    folder, cube = tiny(family), sharding.mesh(2, 2, 2)
    vocabulary = Vocabulary(size, np.arange(96), np.arange(96, 98))
    _, one = hub.load(str(folder), vocabulary=vocabulary)
    model, eight = hub.load(str(folder), cube, vocabulary=vocabulary)
    for path, x in tree.flat(one).items():
        np.testing.assert_array_equal(sharding.to_host(tree.flat(eight)[path]), x)
    cut = eight["embed"]["table"].addressable_shards[0].data.shape
    assert cut == (size if size % 2 else size // 2, 16)
    described = hub.abstract(str(folder), cube, vocabulary=vocabulary)[1]["params"]
    for path, x in tree.flat(eight).items():
        like = tree.flat(described)[path]
        assert (like.shape, like.sharding) == (x.shape, x.sharding)
    assert model.config.vocab_size == size


def test_packed_kernels_have_no_part_in_it(tiny):
    folder = tiny("llama", hidden_size=64, intermediate_size=64)
    vocabulary = Vocabulary(99, np.arange(96), np.arange(96, 99))
    _, plain = hub.load_variables(str(folder), quantise="nf4")
    _, grown = hub.load_variables(str(folder), quantise="nf4", vocabulary=vocabulary)
    for path, x in tree.flat(plain["packed"]).items():
        np.testing.assert_array_equal(tree.flat(grown["packed"])[path], x)
    assert [len(grown["params"][name]["table"]) for name in ("embed", "head")] == [99, 99]


def test_fresh_weights_have_a_row_for_each(exact):
    _, vocabulary = hub.load_vocabulary(str(exact), NEW)
    model, params = hub.init(str(exact), jax.random.key(0), vocabulary=vocabulary)
    assert len(params["embed"]["table"]) == len(params["head"]["table"]) == model.config.vocab_size == WORDS + 3


# ---- a token without a row ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_a_token_without_a_row_is_not_the_last_row_but_nan(tiny, family):
    model, params = hub.load(str(tiny(family)))
    tokens = np.array([[5, 95, 96]], np.int32)
    x = np.asarray(model.features({"params": params}, tokens[:, :2]))
    assert np.isfinite(x).all()
    assert np.isnan(np.asarray(model.features({"params": params}, tokens))).any()


def test_data_and_prompts_with_a_token_that_has_no_row_are_refused_by_name(tmp_path, exact, tiny):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "1<sum>2"}))
    tokenizer, _ = hub.load_vocabulary(str(exact), NEW)
    rows = data.load(data.Config(train=str(tmp_path / "a.jsonl"), max_length=32), tokenizer).train
    data.expect_tokens(rows.sources, WORDS + 1)
    with pytest.raises(data.DataError, match=r"a.jsonl becomes tokens as large as 2560, .* has 2560.*model.new_tokens"):
        data.expect_tokens(rows.sources, WORDS)
    model, params = hub.load(str(exact))
    with pytest.raises(ValueError, match="a prompt has the token 2560, and the model 2560 tokens"):
        sample.generate(model, {"params": params}, [[5], [6, 2560]], max_new_tokens=2)


# ---- files ----------------------------------------------------------------------------------------------------------


def again(folder: Path) -> list:
    """The tokenizer of a folder, as it is loaded here and as transformers loads it."""
    return [hub.load_tokenizer(str(folder)), AutoTokenizer.from_pretrained(folder)]


@pytest.mark.parametrize("settings", ["new", "old"])
def test_the_tokenizer_of_a_folder_comes_back_with_the_new_tokens(exact, tmp_path, settings):
    base = Path(shutil.copytree(exact, tmp_path / "base"))
    if settings == "old":  # transformers 4 lists added tokens in three files
        file, core = base / "tokenizer_config.json", json.loads((base / "tokenizer.json").read_text())
        listed = {str(token.pop("id")): token for token in core["added_tokens"]}
        file.write_text(json.dumps(json.loads(file.read_text()) | {"added_tokens_decoder": listed}))
        (base / "added_tokens.json").write_text("{}")
    tokenizer, _ = hub.load_vocabulary(str(base), NEW, special=["<|tool|>"])
    merged, adapter = tmp_path / "merged", tmp_path / "adapter"
    hub.merge(str(base), str(merged))
    adapter.mkdir()
    text = "the<sum> of 1 and 2<|tool|> unbreakable <diff>"
    for folder in (merged, adapter):
        hub.save_tokens(folder, tokenizer, str(base))
        for back in again(folder):
            assert back.get_vocab() == tokenizer.get_vocab()
            assert back(text)["input_ids"] == tokenizer(text)["input_ids"]
            assert back.decode(range(WORDS, WORDS + 4), skip_special_tokens=True) == "<sum><diff> unbreakable"
    if settings == "old":
        listed = json.loads((merged / "tokenizer_config.json").read_text())["added_tokens_decoder"]
        assert (listed[str(WORDS)]["content"], listed[str(WORDS + 3)]["special"]) == ("<sum>", True)
        added = json.loads((merged / "added_tokens.json").read_text())
        assert added == dict(zip([*NEW, "<|tool|>"], range(WORDS, WORDS + 4), strict=True))
    assert not (adapter / "config.json").exists()
    back, alone = hub.adapter_tokenizer(str(adapter), str(base)), hub.adapter_tokenizer(str(tmp_path), str(base))
    assert (len(back), len(alone)) == (WORDS + 4, WORDS)


def test_a_base_of_older_files_gets_a_tokenizer_json(tiny, tmp_path):
    base = Path(shutil.copytree(tiny("bert", vocab_size=8), tmp_path / "base"))
    (base / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "lamp", "##s"]))
    tokenizer, vocabulary = hub.load_vocabulary(str(base), ["<Sum>"])
    assert vocabulary.new.tolist() == [8]
    hub.merge(str(base), str(tmp_path / "merged"))
    hub.save_tokens(tmp_path / "merged", tokenizer, str(base))
    for back in again(tmp_path / "merged"):
        assert back("the lamps<Sum>")["input_ids"] == [2, 5, 6, 7, 8, 3]
        assert (back.mask_token, back.mask_token_id) == ("[MASK]", 4)


def test_a_folder_without_new_tokens_is_left_as_it_is(exact, tmp_path):
    hub.merge(str(exact), str(tmp_path))
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    hub.save_tokens(tmp_path, hub.load_vocabulary(str(exact))[0], str(exact))
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", TABLES)
def test_a_merge_of_grown_tables_changes_nothing_but_them(tiny, tmp_path, family, dtype):
    folder = tiny(family, dtype=dtype, tied=family != "llama")
    _, params = hub.load(str(folder), vocabulary=Vocabulary(99, np.arange(96), np.arange(96, 99)))
    trained = tree.partition(params, families.TABLES)[0]
    hub.merge(str(folder), str(tmp_path / "merged"), trained=trained)
    hub.export(str(tmp_path / "export"), params, source=str(folder))
    old = load_file(folder / "model.safetensors")
    for name in ("merged", "export"):
        new = load_file(tmp_path / name / "model.safetensors")
        assert set(new) == set(old)
        for tensor, x in old.items():
            grown = tensor in TABLES[family]
            assert new[tensor].shape == ((99, *x.shape[1:]) if grown else x.shape)
            assert new[tensor][: len(x)].tobytes() == x.tobytes()
        wanted = json.loads((folder / "config.json").read_text()) | {"vocab_size": 99}
        assert json.loads((tmp_path / name / "config.json").read_text()) == wanted
        for path, x in tree.flat(hub.load(str(tmp_path / name))[1]).items():
            np.testing.assert_array_equal(x, jnp.asarray(tree.flat(params)[path]).astype(dtype))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_reward_model_has_new_tokens_too(tiny, tmp_path, tied):
    """It has no output layer, so the embedding alone grows."""
    folder, family = tiny("llama", tied=tied), families.FAMILIES["llama"]
    vocabulary = Vocabulary(99, np.arange(96), np.arange(96, 99))
    _, variables = hub.load_variables(str(folder), labels=1, key=jax.random.key(0), vocabulary=vocabulary)
    params, spec = variables["params"], lora.LoRA(2, targets=".*/q")
    trained = tree.partition(params, [families.TABLES, "score/.*"])[0]
    hub.merge(str(folder), str(tmp_path / "merged"), trained=trained)
    again, merged = hub.load(str(tmp_path / "merged"))
    assert (again.config.labels, again.config.vocab_size) == (1, 99)
    for path, x in tree.flat(params).items():
        np.testing.assert_array_equal(tree.flat(merged)[path], x)
    low = lora.init(jax.random.key(1), params, spec)
    how = {"family": family, "base": str(folder), "trained": trained}
    hub.export_adapter(str(tmp_path / "adapter"), low, spec, **how)
    config = hub.read_config(folder)[1]
    back = hub.load_adapter(str(tmp_path / "adapter"), hub.on_disk(str(folder)), family=family, config=config)
    for path, x in tree.flat(trained).items():
        np.testing.assert_array_equal(tree.flat(back.params)[path], x)


def test_a_padded_table_is_merged_without_a_change_of_its_size(padded, tmp_path):
    _, vocabulary = hub.load_vocabulary(str(padded), NEW)
    _, params = hub.load(str(padded), vocabulary=vocabulary)
    hub.merge(str(padded), str(tmp_path), trained={"embed": params["embed"]})
    configs = [json.loads((folder / "config.json").read_text()) for folder in (padded, tmp_path)]
    assert configs[0] == configs[1]
    old, new = (load_file(f / "model.safetensors")["model.embed_tokens.weight"] for f in (padded, tmp_path))
    changed = np.flatnonzero((old != new).any(axis=1))
    assert changed.tolist() == [WORDS, WORDS + 1, WORDS + 2]


def test_a_merge_needs_every_table_and_no_shorter_ones(exact, tmp_path):
    _, params = hub.load(str(exact), vocabulary=hub.load_vocabulary(str(exact), NEW)[1])
    with pytest.raises(
        CheckpointError, match=r"new tokens have rows in a table that was trained, and none in 'lm_head"
    ):
        hub.merge(str(exact), str(tmp_path), trained={"embed": params["embed"]})
    short = {name: {"table": params[name]["table"][:9]} for name in ("embed", "head")}
    with pytest.raises(CheckpointError, match=r"was trained with shape \(9, 32\), but .* has \(2560, 32\)"):
        hub.merge(str(exact), str(tmp_path), trained=short)


def test_an_adapter_of_a_grown_table_is_merged_into_the_grown_table(padded, tmp_path):
    """Ours train whole tables; PEFT can adapt one that has grown."""
    vocabulary = Vocabulary(WORDS + 50, np.arange(WORDS), np.arange(WORDS, WORDS + 50))
    _, params = hub.load(str(padded), vocabulary=vocabulary)
    low = lora.init(jax.random.key(0), params, lora.LoRA(2, targets="embed"))
    low["embed"]["b"] = jax.random.normal(jax.random.key(1), low["embed"]["b"].shape)
    hub.merge(str(padded), str(tmp_path), adapter=low, trained={"embed": params["embed"]})
    merged = hub.load(str(tmp_path))[1]
    expected = lora.merge({"params": params, "lora": low})
    for path, x in tree.flat(expected).items():
        np.testing.assert_allclose(tree.flat(merged)[path], x, atol=1e-6, err_msg=path)
