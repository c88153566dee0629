"""Names as a file has them: without a prefix, in an older form, beside what nothing here computes."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxsft import hub, tree
from jaxsft.hub import CheckpointError, names
from jaxsft.hub.files import SINGLE
from jaxsft.models import FAMILIES

# Ours -> Hugging Face's, written out by hand.
PLAIN = {
    "embed/table": "embeddings.word_embeddings.weight",
    "embed/positions": "embeddings.position_embeddings.weight",
    "embed/types": "embeddings.token_type_embeddings.weight",
    "embed/norm/scale": "embeddings.LayerNorm.weight",
    "embed/norm/bias": "embeddings.LayerNorm.bias",
}
MODULES = {
    "attn/q": "attention.self.query",
    "attn/k": "attention.self.key",
    "attn/v": "attention.self.value",
    "attn/o": "attention.output.dense",
    "attn_norm": "attention.output.LayerNorm",
    "mlp/up": "intermediate.dense",
    "mlp/down": "output.dense",
    "mlp_norm": "output.LayerNorm",
}
HEADS = {
    "bert": {"mlm/dense": "cls.predictions.transform.dense", "mlm/norm": "cls.predictions.transform.LayerNorm"},
    "roberta": {"mlm/dense": "lm_head.dense", "mlm/norm": "lm_head.layer_norm"},
}
BIAS = {"bert": "cls.predictions.bias", "roberta": "lm_head.bias"}
KINDS = {"bert": "Bert", "roberta": "Roberta"}
both = pytest.mark.parametrize("family", KINDS)


def expected(raw, path, family):
    """The value of an encoder's leaf, from the tensors of the file by a plain loop over its layers."""
    prefix = f"{family}." if any(name.startswith(f"{family}.") for name in raw) else ""
    if path in PLAIN:
        return raw[prefix + PLAIN[path]]
    if path == "mlm/bias":
        return raw[BIAS[family]]
    *module, part = path.split("/")
    end, turn = ("bias" if part == "bias" else "weight"), part == "kernel"
    if module[0] == "mlm":
        found = raw[f"{HEADS[family]['/'.join(module)]}.{end}"]
        return found.T if turn else found
    name = MODULES["/".join(module[2:])]
    layers = [raw[f"{prefix}encoder.layer.{layer}.{name}.{end}"] for layer in range(4)]
    return np.stack([x.T if turn else x for x in layers])


def rewrite(folder, change):
    """Writes a folder's single file again with `change(name, tensor)` -> name, for each of its tensors."""
    tensors = load_file(folder / SINGLE)
    save_file({change(name): x for name, x in tensors.items()}, folder / SINGLE, metadata={"format": "pt"})


def add(folder, **more):
    save_file(load_file(folder / SINGLE) | more, folder / SINGLE, metadata={"format": "pt"})


def older(name):
    return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")


@both
@pytest.mark.parametrize("architecture", ["ForMaskedLM", "Model"])
def test_every_value_of_an_encoder_lands_in_its_leaf(tiny, family, architecture):
    folder = tiny(family, architectures=[KINDS[family] + architecture])
    model, params = hub.load(str(folder))
    raw, leaves = load_file(folder / SINGLE), tree.flat(params)
    apart = [name for name in raw if "pooler" in name]
    assert len(raw) - len(apart) == sum(len(x) if path.startswith("blocks") else 1 for path, x in leaves.items())
    assert ("mlm" in params) == model.config.mlm == (architecture == "ForMaskedLM")
    for path, leaf in leaves.items():
        np.testing.assert_array_equal(leaf, expected(raw, path, family), err_msg=path, strict=True)


@both
def test_a_file_without_the_prefix_or_with_older_names_reads_the_same_and_is_written_as_it_was(tiny, tmp_path, family):
    base = KINDS[family] + "Model"
    usual = tiny(family, architectures=[base])  # without the prefix, as AutoModel saves it
    params = hub.load(str(usual))[1]
    prefixed = tiny(family, architectures=[base])
    rewrite(prefixed, lambda name: f"{family}.{name}")
    old = tiny(family, architectures=[base])
    rewrite(old, older)
    for number, folder in enumerate((usual, prefixed, old)):
        again = hub.load(str(folder))[1]
        assert all(np.array_equal(x, tree.flat(again)[path]) for path, x in tree.flat(params).items())
        raw = load_file(folder / SINGLE)
        for write in ("merge", "export"):
            out = tmp_path / f"{write}{number}"
            _ = (
                hub.merge(str(folder), str(out))
                if write == "merge"
                else hub.export(str(out), params, source=str(folder))
            )
            written = load_file(out / SINGLE)
            assert {n: x.tobytes() for n, x in written.items()} == {n: x.tobytes() for n, x in raw.items()}


def test_an_export_to_a_folder_whose_source_has_no_weights_has_the_familys_names(tiny, tmp_path):
    folder = tiny("bert")
    params, raw = hub.load(str(folder))[1], load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    (file,) = hub.export(str(tmp_path), params, source=str(folder))
    written = load_file(file)
    assert set(written) == set(raw)
    assert all(np.array_equal(x, raw[name]) for name, x in written.items())


def test_heads_that_nobody_asks_and_buffers_of_any_dtype_are_left_out_and_copied_untouched(tiny, tmp_path):
    folder = tiny("bert", architectures=["BertForPreTraining"])
    buffer = np.arange(256)[None]
    add(folder, **{"bert.embeddings.position_ids": buffer})
    params = hub.load(str(folder))[1]
    assert not [path for path in tree.flat(params) if "pool" in path or "relationship" in path]
    trained = jax.tree.map(lambda x: x + 1, params)
    hub.merge(str(folder), str(tmp_path), trained=trained)
    before, after = load_file(folder / SINGLE), load_file(tmp_path / SINGLE)
    apart = [name for name in before if "pooler" in name or "relationship" in name or "position_ids" in name]
    assert len(apart) == 5
    assert after["bert.embeddings.position_ids"].dtype == np.int64
    for name, x in before.items():
        assert np.array_equal(after[name], x) == (name in apart), name


def test_second_names_of_tied_weights_follow_the_first(tiny, tmp_path):
    folder = tiny("bert", num_hidden_layers=1)
    raw = load_file(folder / SINGLE)
    table, bias = raw["bert.embeddings.word_embeddings.weight"], raw["cls.predictions.bias"]
    add(folder, **{"cls.predictions.decoder.weight": table, "cls.predictions.decoder.bias": bias})
    hub.load(str(folder))
    hub.merge(
        str(folder), str(tmp_path), trained={"embed": {"table": jnp.ones((96, 32))}, "mlm": {"bias": jnp.ones(96)}}
    )
    after = load_file(tmp_path / SINGLE)
    for name in ("bert.embeddings.word_embeddings.weight", "cls.predictions.bias"):
        assert np.all(after[name] == 1)
    for name in ("cls.predictions.decoder.weight", "cls.predictions.decoder.bias"):
        assert np.all(after[name] == 1)


def test_a_tensor_that_an_encoder_has_no_use_for_is_an_error(tiny):
    folder = tiny("bert", architectures=["BertModel"])
    add(folder, **{"classifier.weight": np.zeros((2, 32), np.float32)})
    with pytest.raises(CheckpointError, match="has tensors this family does not know: classifier.weight"):
        hub.load(str(folder))


@both
def test_an_encoder_whose_file_has_no_head_has_none_whatever_its_config_says(tiny, family):
    folder = tiny(family, architectures=[f"{KINDS[family]}Model"])
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": [f"{KINDS[family]}ForMaskedLM"]}))
    model, params = hub.load(str(folder))
    assert not model.config.mlm
    assert "mlm" not in params
    (folder / SINGLE).unlink()
    assert hub.read_config(folder)[1].mlm  # random weights will be as the config says


def test_a_missing_tensor_has_the_familys_name(tiny):
    folder = tiny("bert")
    tensors = load_file(folder / SINGLE)
    del tensors["cls.predictions.transform.LayerNorm.bias"]
    save_file(tensors, folder / SINGLE)
    with pytest.raises(CheckpointError, match="lacks the tensor 'cls.predictions.transform.LayerNorm.bias'"):
        hub.load(str(folder))


def test_a_name_is_looked_for_with_and_without_prefix_in_both_forms():
    family, name = FAMILIES["bert"], "bert.embeddings.LayerNorm.bias"
    for there in (name, "embeddings.LayerNorm.bias", "bert.embeddings.LayerNorm.beta", "embeddings.LayerNorm.beta"):
        assert names.stored(family, name, ["pooler.dense.weight", there]) == there
    assert names.stored(family, name, []) == name
    assert names.stored(FAMILIES["llama"], "model.norm.weight", ["norm.weight"]) == "norm.weight"  # an embedder's file
    assert names.stored(FAMILIES["llama"], "lm_head.weight", ["head.weight"]) == "lm_head.weight"
