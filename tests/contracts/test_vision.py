"""What every registered family of images keeps to; a new one is covered the moment it is registered."""

import jax
import jax.numpy as jnp
import pytest

from jaxsft import hub, lora, models, sharding, tree
from jaxsft.hub import names
from jaxsft.models import VISION, ResNetConfig, TowerConfig

TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}
STAGES = {"hidden_sizes": [8, 16], "depths": [1, 3]}
OWN = {
    "clip": {"vision_config": TOWER},
    "siglip": {"vision_config": TOWER},
    "resnet": {**STAGES, "embedding_size": 8},
    "convnext": {**STAGES, "num_stages": 2},
    "convnextv2": {**STAGES, "num_stages": 2},
    "dinov2": {**TOWER, "mlp_ratio": 2},
    "dinov2_with_registers": {**TOWER, "mlp_ratio": 2, "num_register_tokens": 2},
}
OWN["dinov2"].pop("intermediate_size")
OWN["dinov2_with_registers"].pop("intermediate_size")
family = pytest.mark.parametrize("kind", VISION)
IMAGES = jax.ShapeDtypeStruct((2, 32, 48, 3), jnp.float32)


def raw(kind: str, **more) -> dict:
    return {"model_type": kind, **OWN.get(kind, TOWER), **more}


def config_of(kind: str, labels: int = 3):
    return models.with_labels(VISION[kind], VISION[kind].read_config(raw(kind)), labels)


@family
def test_every_parameter_has_one_name_and_one_sharding_rule(kind):
    shapes, rules = hub.shapes(config_of(kind, 4)), VISION[kind].rules
    sharding.check(rules, shapes)
    placed, found = tree.flat(sharding.shardings(shapes, rules, sharding.mesh(2, 2, 2))), []
    for path, leaf in tree.flat(shapes).items():
        here, transposed = names.leaf_names(VISION[kind], path, leaf.shape)
        assert here.shape == leaf.shape[: here.ndim]
        assert (here.ndim > 0) == any(map(names.STACK.fullmatch, path.split("/")))
        assert transposed <= path.endswith("/kernel")
        assert len(placed[path].spec) == len(leaf.shape)
        found += here.flat
    assert len(found) == len(set(found))
    assert any("tensor" in placed[path].spec for path in placed)
    known = names.places(VISION[kind], config_of(kind, 4))
    assert set(found) <= set(known)
    by_address = names.by_address(VISION[kind], shapes)
    assert {known[name].address for name in found} == set(by_address)


@family
def test_a_classifier_is_as_wide_as_the_vector_and_the_class_of_transformers_is_told(kind):
    config, bare = config_of(kind), config_of(kind, 0)
    assert (
        tree.flat(hub.shapes(bare)).keys() | {"classifier/kernel", "classifier/bias"}
        == tree.flat(hub.shapes(config)).keys()
    )
    for one, width in ((config, config.hidden + 1), (bare, config.hidden)):
        params = {"params": hub.shapes(one)}
        assert jax.eval_shape(models.build(one).features, params, IMAGES).shape == (2, 1, width)
    table = jax.eval_shape(models.build(config).output, {"params": hub.shapes(config)})
    assert table.shape == (3, config.hidden + 1)
    assert VISION[kind].classifier.endswith("ForImageClassification")
    both = {"architectures": [VISION[kind].classifier], "num_labels": 7}
    towers = kind in ("clip_vision_model", "siglip_vision_model")  # whose classifier is of the config of both towers
    assert VISION[kind].read_config(raw(kind, **both)).labels == (0 if towers else 7)


@family
def test_hidden_states_are_of_the_same_parameters(kind):
    config = config_of(kind)
    bare = type(config)(**{**vars(config), "labels": 0, "pooling": "none"})
    out = jax.eval_shape(models.build(bare).features, {"params": hub.shapes(config)}, IMAGES)
    assert out.ndim == 3
    assert out.shape[1] > 1


@family
def test_every_adapter_leaf_is_placed_and_the_last_layers_can_be_cut(kind):
    config = config_of(kind)
    if isinstance(config, ResNetConfig):
        return
    params = hub.shapes(config, cut=2 if config.layers else None)
    targets = lora.ALL if config.layers else "stage1/.*/(up|down)"
    make = lambda key, params: lora.init(key, params, lora.LoRA(rank=2, targets=targets))
    low = jax.eval_shape(make, jax.random.key(0), params)
    placed = sharding.shardings(low, lora.rules(VISION[kind].rules), sharding.mesh(2, 2, 2))
    assert tree.flat(placed).keys() == tree.flat(low).keys()
    assert len(tree.flat(low)) == (3 * 6 * 2 if config.layers else 3 * 2)
    model = models.build(config)
    assert jax.eval_shape(model.features, {"params": params, "lora": low}, IMAGES).shape == (2, 1, config.hidden + 1)
    found = names.adapted(VISION[kind], low)
    assert len(found) == (18 if isinstance(config, TowerConfig) else 6)


@family
def test_a_key_that_nobody_reads_is_refused_by_name(kind):
    with pytest.raises(ValueError, match="'stride_of_doom' = 3"):
        VISION[kind].read_config(raw(kind, stride_of_doom=3))
