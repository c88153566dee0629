"""Reward models in and out: a score read, drawn, merged, in every kind of base."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxsft import hub, lora, models, quant, results, sharding, tree, tuning
from jaxsft.hub import CheckpointError
from jaxsft.hub.files import SINGLE, Reader
from jaxsft.lora import LoRA
from jaxsft.models import FAMILIES

KEY = jax.random.key(7)
BASES = [("llama", False), ("llama", True), ("qwen3", False), ("gpt2", True), ("mixtral", False), ("phi3", True)]
bases = pytest.mark.parametrize(("family", "tied"), BASES)


def said(folder, **keys):
    """Changes a folder's config.json and gives it back."""
    config = json.loads((folder / "config.json").read_text()) | keys
    (folder / "config.json").write_text(json.dumps(config))
    return config


def raw(folder) -> dict[str, tuple]:
    """Every tensor of a folder as dtype, shape and bytes."""
    reader = Reader(folder)
    return {n: (reader.dtype(n), reader.shape(n), reader.read(n).tobytes()) for n in reader.files}


def to_judge(folder, kernel, tmp_path, dtype=np.float32):
    """A copy of a language model's folder as a reward model, made by hand."""
    copy = shutil.copytree(folder, tmp_path / "judge")
    tensors = load_file(copy / SINGLE)
    tensors.pop("lm_head.weight", None)
    save_file(tensors | {"score.weight": np.ascontiguousarray(kernel.T, dtype)}, copy / SINGLE)
    said(copy, architectures=["LlamaForSequenceClassification"], id2label={"0": "good"}, label2id={"good": 0})
    return copy


def same(ours, theirs):
    ours, theirs = tree.flat(ours), tree.flat(theirs)
    assert ours.keys() == theirs.keys()
    for path, leaf in ours.items():
        np.testing.assert_array_equal(leaf, theirs[path], err_msg=path, strict=True)


def kernel_of(model, seed=0):
    return np.random.default_rng(seed).normal(size=(model.config.hidden, 1)).astype(np.float32)


# ---- load --------------------------------------------------------------------------------------------------------


@bases
def test_a_language_model_loads_without_its_output_layer_and_with_a_score_that_the_key_draws(tiny, family, tied):
    folder = tiny(family, tied=tied)
    plain, params = hub.load(str(folder))
    model, variables = hub.load_variables(str(folder), labels=1, key=KEY)
    assert (plain.config.labels, model.config.labels) == (0, 1)
    kernel = variables["params"].pop("score")["kernel"]
    same(variables["params"], {name: part for name, part in params.items() if name != "head"})
    assert (kernel.shape, kernel.dtype) == ((32, 1), jnp.float32)
    again, other = (
        hub.load_variables(str(folder), labels=1, key=k)[1]["params"]["score"] for k in (KEY, jax.random.key(8))
    )
    assert np.array_equal(kernel, again["kernel"])
    assert not np.array_equal(kernel, other["kernel"])


def test_the_score_is_float32_of_the_configs_deviation_whatever_the_rest_is(tiny):
    shape = {"hidden_size": 4096, "head_dim": 8, "num_attention_heads": 1, "num_key_value_heads": 1, "vocab_size": 8}
    folder = tiny("llama", dtype="bfloat16", num_hidden_layers=1, **shape)
    draw = lambda: hub.load_variables(str(folder), dtype=jnp.bfloat16, labels=1, key=KEY)[1]["params"]
    usual, params = draw()["score"]["kernel"], draw()
    assert {path for path, x in tree.flat(params).items() if x.dtype == jnp.float32} == {"score/kernel"}
    assert abs(float(usual.std()) - 0.02) < 0.001
    said(folder, initializer_range=0.5)
    np.testing.assert_allclose(draw()["score"]["kernel"], 25 * usual, rtol=1e-5)


def test_without_a_key_there_is_nothing_to_draw_from(tiny):
    with pytest.raises(ValueError, match="has no output layer for labels=1, so one is drawn; give a key"):
        hub.load_variables(str(tiny("llama", num_hidden_layers=1)), labels=1)


@pytest.mark.parametrize("labels", [None, 1])
def test_a_reward_model_loads_with_the_score_it_has(tiny, tmp_path, labels):
    folder = tiny("llama", num_hidden_layers=2)
    plain, params = hub.load(str(folder))
    kernel = kernel_of(plain)
    judge = to_judge(folder, kernel, tmp_path)
    model, variables = hub.load_variables(
        str(judge), labels=labels, dtype=jnp.bfloat16, full_precision="params/score/.*"
    )
    assert model.config.labels == 1
    np.testing.assert_array_equal(variables["params"]["score"]["kernel"], kernel, strict=True)
    same(hub.load(str(judge))[1], {**{k: v for k, v in params.items() if k != "head"}, "score": {"kernel": kernel}})
    same(jax.tree.map(np.asarray, hub.on_disk(str(judge))), hub.load(str(judge))[1])


def test_a_score_that_is_missing_or_of_another_size_is_named(tiny, tmp_path):
    folder = tiny("llama", num_hidden_layers=1)
    judge = to_judge(folder, np.zeros((31, 1), np.float32), tmp_path)
    with pytest.raises(
        CheckpointError, match=r"'score.weight' in .* has shape \(1, 31\); config.json implies \(1, 32\)"
    ):
        hub.load(str(judge))
    tensors = load_file(judge / SINGLE)
    tensors.pop("score.weight")
    save_file(tensors, judge / SINGLE)
    with pytest.raises(CheckpointError, match=r"lacks the tensor 'score.weight', which its config.json implies"):
        hub.load_variables(str(judge), labels=1, key=KEY)  # nothing is drawn in the place of what a folder promises
    said(judge, id2label={"0": "bad", "1": "good"})
    with pytest.raises(CheckpointError, match="config.json: config.json names Llama.* with 2 labels .*which have 1"):
        hub.load(str(judge))


@pytest.mark.parametrize(("family", "message"), [
    ("granite", "is a 'granite' model: transformers has no ...ForSequenceClassification of this family"),
    ("bert", "is a 'bert' model: an encoder has no score of a text here; reward models are decoders"),
])  # fmt: skip
def test_what_cannot_be_a_reward_model_is_refused(tiny, family, message):
    with pytest.raises(CheckpointError, match=message):
        hub.load_variables(str(tiny(family, num_hidden_layers=1)), labels=1, key=KEY)


def test_a_reward_model_is_no_language_model(tiny, tmp_path):
    folder = tiny("llama", num_hidden_layers=1)
    judge = to_judge(folder, np.zeros((32, 1), np.float32), tmp_path)
    with pytest.raises(CheckpointError, match="this model scores whole texts and has no output layer"):
        hub.load_variables(str(judge), labels=0)


@pytest.mark.parametrize("kind", quant.KINDS)
def test_a_score_lies_beside_packed_kernels_in_a_cut_stack_on_a_mesh(tiny, kind):
    folder, mesh = tiny("llama", attention_bias=True), sharding.mesh(2, 2, 2)
    how = {"quantise": kind, "cut": 1, "dtype": jnp.bfloat16}
    _, plain = hub.load_variables(str(folder), mesh, **how)
    model, judge = hub.load_variables(str(folder), mesh, labels=1, key=KEY, **how)
    same(judge["packed"], plain["packed"])
    assert set(judge["params"]["blocks"]) == {"0-0", "1-3"}
    kernel = judge["params"]["score"]["kernel"]
    assert kernel.sharding.spec == jax.P("fsdp", None)
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(16, 1)}
    one = hub.load_variables(str(folder), labels=1, key=KEY)[1]["params"]["score"]["kernel"]
    np.testing.assert_array_equal(kernel, one)  # the key draws alike wherever it lies
    run = lambda variables, tokens: models.scores(variables, model.features(variables, tokens))
    assert jax.eval_shape(run, judge, jax.ShapeDtypeStruct((2, 6), jnp.int32)).shape == (2, 6)


@pytest.mark.parametrize("how", [{}, {"quantise": "nf4", "cut": 2}, {"full_precision": ".*norm/scale"}])
def test_what_a_plan_sees_is_what_loads(tiny, how):
    folder, mesh = tiny("llama", tied=True), sharding.mesh(2, 2, 2)
    how = {"dtype": jnp.bfloat16, "labels": 1, **how}
    (model, seen), (other, loaded) = (
        hub.abstract(str(folder), mesh, **how),
        hub.load_variables(str(folder), mesh, key=KEY, **how),
    )
    assert model.config == other.config
    describe = lambda x: (x.shape, x.dtype, x.sharding)
    assert {p: describe(x) for p, x in tree.flat(seen).items()} == {
        p: describe(x) for p, x in tree.flat(loaded).items()
    }


# ---- merge -------------------------------------------------------------------------------------------------------


@bases
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_language_model_and_a_score_merge_into_a_reward_model(tiny, family, tied, dtype, tmp_path):
    folder = tiny(family, tied=tied, dtype=dtype)
    model, variables = hub.load_variables(str(folder), labels=1, key=KEY)
    kernel = kernel_of(model)
    hub.merge(str(folder), str(tmp_path), trained={"score": {"kernel": kernel}})
    base, merged = raw(folder), raw(tmp_path)
    assert merged.keys() == (base.keys() - {"lm_head.weight"}) | {"score.weight"}
    assert all(merged[name] == base[name] for name in merged.keys() & base.keys())
    kind = jnp.dtype(dtype)
    assert merged["score.weight"] == (kind, (1, 32), kernel.T.astype(kind).tobytes())
    before, after = (json.loads((at / "config.json").read_text()) for at in (folder, tmp_path))
    assert after == before | {
        "architectures": [FAMILIES[family].classifier],
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
        "pad_token_id": None,  # the folder has no tokenizer to choose a token from
    }
    again, loaded = hub.load_variables(str(tmp_path))
    assert again.config == model.config
    same(loaded["params"], {**variables["params"], "score": {"kernel": kernel.astype(kind).astype(np.float32)}})


def test_a_carried_copy_of_a_tied_table_is_left_out(tiny, tmp_path):
    folder = tiny("llama", tied=True, num_hidden_layers=1)
    tensors = load_file(folder / SINGLE)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}, folder / SINGLE)
    _, variables = hub.load_variables(str(folder), labels=1, key=KEY)
    hub.merge(str(folder), str(tmp_path), trained={"score": variables["params"]["score"]})
    assert "lm_head.weight" not in raw(tmp_path)


@pytest.mark.parametrize("tied", [False, True])
def test_an_adapter_of_the_embedding_and_the_score_merge_without_an_output_layer(tiny, tied, tmp_path):
    folder = tiny("llama", tied=tied, num_hidden_layers=2)
    _, variables = hub.load_variables(str(folder), labels=1, key=KEY)
    params = variables["params"]
    adapter = lora.init(KEY, params, LoRA(rank=2, targets="embed|.*/q"))
    adapter = jax.tree.map(lambda x: x + 0.1, adapter)
    hub.merge(str(folder), str(tmp_path), adapter=adapter, trained={"score": params["score"]})
    found = hub.load(str(tmp_path))[1]
    expected = lora.merge({"params": params, "lora": adapter})
    assert tree.flat(found).keys() == tree.flat(expected).keys()
    for path, leaf in tree.flat(found).items():
        np.testing.assert_allclose(leaf, tree.flat(expected)[path], atol=1e-6, err_msg=path)
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is tied


def test_a_reward_model_keeps_its_score_and_its_labels_or_gets_another_score(tiny, tmp_path):
    folder = tiny("llama", num_hidden_layers=1, dtype="bfloat16")
    judge = to_judge(folder, kernel_of(hub.load(str(folder))[0]), tmp_path, dtype=jnp.bfloat16)
    hub.merge(str(judge), str(tmp_path / "same"))
    assert raw(tmp_path / "same") == raw(judge)
    new = np.full((32, 1), 0.3, np.float32)
    hub.merge(str(judge), str(tmp_path / "other"), trained={"score": {"kernel": new}})
    changed = raw(tmp_path / "other")
    assert {name for name in changed if changed[name] != raw(judge)[name]} == {"score.weight"}
    assert changed["score.weight"][2] == new.astype(jnp.bfloat16).tobytes()
    for name in ("same", "other"):
        assert json.loads((tmp_path / name / "config.json").read_text())["id2label"] == {"0": "good"}


@pytest.mark.parametrize(("trained", "message"), [
    ({"score": {"kernel": np.zeros((31, 1), np.float32)}}, r"was trained with shape \(1, 31\), but the base implies"),
    ({"score": {"kernel": np.zeros((32, 1), np.float32)}, "head": {"table": np.zeros((96, 32), np.float32)}},
     "has no head/table .* to merge into"),
])  # fmt: skip
def test_a_score_of_another_size_or_beside_an_output_layer_is_refused(tiny, trained, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        hub.merge(str(tiny("llama", num_hidden_layers=1)), str(tmp_path), trained=trained)


def test_a_family_that_transformers_cannot_score_with_is_not_merged(tiny, tmp_path):
    with pytest.raises(CheckpointError, match="is a 'granite' model: transformers has no"):
        hub.merge(str(tiny("granite")), str(tmp_path), trained={"score": {"kernel": np.zeros((32, 1), np.float32)}})


@pytest.mark.parametrize("tied", [False, True])
def test_a_whole_reward_model_exports_over_a_language_models_folder(tiny, tied, tmp_path):
    folder = tiny("llama", tied=tied, num_hidden_layers=1)
    model, variables = hub.load_variables(str(folder), labels=1, key=KEY)
    hub.export(str(tmp_path), variables["params"], source=str(folder))
    again, loaded = hub.load_variables(str(tmp_path))
    assert again.config == model.config
    same(loaded, variables)
    lacking = {name: part for name, part in variables["params"].items() if name != "norm"}
    with pytest.raises(CheckpointError, match="the parameters lack norm/scale"):
        hub.export(str(tmp_path / "not"), lacking, source=str(folder))


def test_a_run_leaves_a_reward_model_and_its_adapter(tiny, tmp_path):
    """`results.save`, as a script calls it: nothing but the parameters says that they are of a reward model."""
    base, one = tiny("llama", tied=True, tokenizer=True, num_hidden_layers=2), sharding.mesh(devices=jax.devices()[:1])
    plan = tuning.plan(tuning.Config(lora=LoRA(rank=2)), 2, also=["score/.*"])
    model, variables = hub.load_variables(str(base), labels=1, key=KEY)
    trained, frozen = tuning.apply(plan, variables, KEY, mesh=one, rules=FAMILIES["llama"].rules)
    trained = jax.tree.map(lambda x: x + 0.1, trained)
    how = {"tokenizer": hub.load_tokenizer(str(base)), "config": hub.ExportConfig()}
    written = results.save(tmp_path, str(base), tuning.Learner(model, plan, trained, frozen), **how)
    expected = lora.merge(tree.combine(trained, frozen))
    params = hub.load(str(written["merged"]))[1]
    for path, leaf in tree.flat(params).items():
        np.testing.assert_allclose(leaf, tree.flat(expected)[path], atol=1e-6, err_msg=path)
    family, shape = hub.read_config(base)
    adapter = hub.load_adapter(str(written["adapter"]), hub.on_disk(str(base)), family=family, config=shape)
    np.testing.assert_array_equal(adapter.params["score"]["kernel"], trained["params"]["score"]["kernel"])
    assert tree.flat(adapter.params).keys() == {"score/kernel"}
