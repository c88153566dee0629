"""Classifiers of images: what they are made of, and what is written of them."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxsft import hub, lora, models, tree
from jaxsft.hub import CheckpointError
from jaxsft.models import VISION

TOWER = {
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
NAMES = ["tulip", "rose"]
PREPROCESS = '{"image_processor_type": "ViTImageProcessor", "size": {"height": 8, "width": 8}}'


def saved(folder, kind: str, extra=(), **config):
    """A checkpoint of random weights, with tensors that nobody here computes with."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": kind, **config}))
    model, params = hub.init(str(folder), jax.random.key(0))
    hub.export(str(folder), params, source=str(folder))
    file = folder / "model.safetensors"
    bare = {name.removeprefix(VISION[kind].prefix): x for name, x in load_file(file).items()}
    tensors = bare if not model.config.labels else load_file(file)
    save_file(tensors | {name: np.ones(3, np.float32) for name in extra}, file)
    (folder / "preprocessor_config.json").write_text(PREPROCESS)
    return folder


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vit") / "base"
    return saved(folder, "vit", ["pooler.dense.bias"], architectures=["ViTModel"], **TOWER)


@pytest.fixture(scope="module")
def classifier(vit, tmp_path_factory):
    """(variables, folder of what was merged) of a classifier of two made of it."""
    folder = tmp_path_factory.mktemp("two")
    _, variables = hub.load_variables(str(vit), labels=2, key=jax.random.key(1))
    hub.merge(str(vit), str(folder), trained={"classifier": variables["params"]["classifier"]}, classes=NAMES)
    return variables, folder


def test_a_tower_gets_a_classifier_drawn_by_the_key(vit):
    plain, base = hub.load(str(vit), dtype=jnp.bfloat16)
    draw = lambda key: hub.load_variables(str(vit), labels=500, key=jax.random.key(key), dtype=jnp.bfloat16)
    model, variables = draw(0)
    head = variables["params"]["classifier"]
    assert (plain.config.labels, model.config.labels) == (0, 500)
    assert (head["kernel"].shape, head["kernel"].dtype, head["bias"].dtype) == ((8, 500), jnp.float32, jnp.float32)
    np.testing.assert_allclose(np.std(head["kernel"]), 0.02, rtol=0.1)
    assert not np.any(head["bias"])
    assert np.any(draw(1)[1]["params"]["classifier"]["kernel"] != head["kernel"])
    assert tree.flat(base).keys() == tree.flat(variables["params"]).keys() - {"classifier/kernel", "classifier/bias"}
    with pytest.raises(ValueError, match="has no output layer for labels=2, so one is drawn; give a key"):
        hub.load_variables(str(vit), labels=2)
    with pytest.raises(CheckpointError, match="labels is -1; it must be the number of classes, or 0 for none"):
        hub.load_variables(str(vit), labels=-1)


def test_a_merged_classifier_has_the_names_of_its_class_and_of_its_classes(vit, classifier):
    variables, folder = classifier
    base, merged = load_file(vit / "model.safetensors"), load_file(folder / "model.safetensors")
    kept = {f"vit.{name}" for name in base if not name.startswith("pooler.")}
    assert merged.keys() == kept | {"classifier.weight", "classifier.bias"}
    assert all((merged[name] == base[name.removeprefix("vit.")]).all() for name in kept)
    np.testing.assert_array_equal(merged["classifier.weight"], variables["params"]["classifier"]["kernel"].T)
    said = json.loads((folder / "config.json").read_text())
    assert said["architectures"] == ["ViTForImageClassification"]
    assert said["id2label"] == {"0": "tulip", "1": "rose"}
    assert said["label2id"] == {"tulip": 0, "rose": 1}
    assert hub.classes(str(folder)) == NAMES
    assert (folder / "preprocessor_config.json").read_text() == PREPROCESS


def test_a_classifier_keeps_its_layer_and_names_or_gets_others(classifier, tmp_path):
    variables, folder = classifier
    for labels in (None, 2):
        model, again = hub.load_variables(str(folder), labels=labels)
        assert model.config.labels == 2
        for path, leaf in tree.flat(variables).items():
            np.testing.assert_array_equal(tree.flat(again)[path], leaf)
    model, three = hub.load_variables(str(folder), labels=3, key=jax.random.key(2))
    hub.export(str(tmp_path / "three"), three["params"], source=str(folder))
    assert hub.classes(str(tmp_path / "three")) == ["LABEL_0", "LABEL_1", "LABEL_2"]
    hub.export(str(tmp_path / "two"), variables["params"], source=str(folder))
    assert hub.classes(str(tmp_path / "two")) == NAMES
    model, bare = hub.load_variables(str(folder), labels=0)
    assert "classifier" not in bare["params"]


@pytest.mark.parametrize("named", [["tulip"], ["tulip", "tulip"], ["a", "b", "c"]])
def test_classes_need_as_many_names_each_another(classifier, tmp_path, named):
    variables, folder = classifier
    with pytest.raises(CheckpointError, match="2 classes need as many names, each another; given are"):
        hub.export(str(tmp_path), variables["params"], source=str(folder), classes=named)


@pytest.mark.parametrize(("kind", "parent", "lost"), [
    ("clip_vision_model", "clip", "visual_projection.weight"),
    ("siglip_vision_model", "siglip", "logit_bias"),
])  # fmt: skip
def test_a_tower_becomes_the_classifier_of_the_config_of_both(tmp_path, kind, parent, lost):
    kept = "head.probe" if parent == "siglip" else "post_layernorm.bias"
    base = saved(tmp_path / "base", kind, [lost, kept], **TOWER, dtype="float32")
    model, variables = hub.load_variables(str(base), labels=2, key=jax.random.key(1))
    hub.merge(str(base), str(tmp_path / "merged"), trained={"classifier": variables["params"]["classifier"]})
    said = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert said["model_type"] == parent
    assert said["vision_config"] == {"model_type": kind, **TOWER}
    assert said["dtype"] == "float32"
    names = load_file(tmp_path / "merged" / "model.safetensors").keys()
    assert f"vision_model.{kept}" in names
    assert all(name.startswith(("vision_model.", "classifier.")) for name in names)
    again, params = hub.load(str(tmp_path / "merged"))
    assert again.config == model.config
    for path, leaf in tree.flat(variables["params"]).items():
        np.testing.assert_array_equal(tree.flat(params)[path], leaf)


def test_an_adapter_and_its_classifier_go_out_and_come_back(vit, tmp_path):
    model, variables = hub.load_variables(str(vit), labels=2, key=jax.random.key(1))
    low = lora.init(jax.random.key(2), variables["params"], lora.LoRA(rank=2))
    low = jax.tree.map(lambda x: x + 0.1, low)
    given = {"family": VISION["vit"], "base": str(vit), "config": model.config}
    trained = {"classifier": variables["params"]["classifier"]}
    hub.export_adapter(str(tmp_path), low, lora.LoRA(rank=2), trained=trained, **given)
    said = json.loads((tmp_path / "adapter_config.json").read_text())
    assert said["task_type"] is None
    assert said["modules_to_save"] == ["classifier"]
    assert "vit.layers.1.attention.q_proj" in said["target_modules"]
    plain = models.with_labels(VISION["vit"], model.config, 0)
    again = hub.load_adapter(str(tmp_path), hub.on_disk(str(vit)), family=VISION["vit"], config=plain)
    for path, leaf in tree.flat(low).items():
        np.testing.assert_allclose(tree.flat(again.lora)[path], leaf, rtol=1e-6)
    np.testing.assert_array_equal(again.params["classifier"]["kernel"], trained["classifier"]["kernel"])
