import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxsft import hub, lora, models, tree
from jaxsft.hub import CheckpointError
from jaxsft.lora import LoRA

FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"
SPEC = LoRA(rank=3, alpha=12.0, dropout=0.25, rslora=True, targets=".*/(q|v|down)")
MODULES = {"attn/q": "self_attn.q_proj", "attn/v": "self_attn.v_proj", "mlp/down": "mlp.down_proj"}
FAMILY = models.FAMILIES["llama"]


@pytest.fixture(scope="module")
def config(tiny):
    return hub.read_config(tiny("llama"))[1]


@pytest.fixture(scope="module")
def params(config):
    """Shapes are all that an adapter needs of the base."""
    return hub.shapes(config)


def random(params, spec, seed=0):
    draw, made = np.random.default_rng(seed), tree.flat(lora.init(jax.random.key(0), params, spec))
    return tree.nest({
        p: x if p.endswith("/scale") else jnp.asarray(draw.normal(size=x.shape), jnp.float32) for p, x in made.items()
    })  # fmt: skip


@pytest.fixture(scope="module")
def adapter(params):
    return random(params, SPEC)


@pytest.fixture
def folder(adapter, tmp_path):
    hub.export_adapter(str(tmp_path), adapter, SPEC, family=FAMILY, base="org/base")
    return tmp_path


def same(ours, theirs):
    ours, theirs = tree.flat(ours), tree.flat(theirs)
    assert set(ours) == set(theirs)
    for path in ours:
        np.testing.assert_array_equal(ours[path], theirs[path], err_msg=path)


def change(folder, **keys):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | keys))


def rewrite(folder, spoil):
    tensors = load_file(folder / FILE)
    spoil(tensors)
    save_file(tensors, folder / FILE)


def load(folder, params, config):
    return hub.load_adapter(str(folder), params, family=FAMILY, config=config)


@pytest.mark.parametrize("family", models.FAMILIES)
def test_an_adapter_comes_back_as_it_was_exported(tiny, tmp_path, family):
    shape = hub.read_config(tiny(family))[1]
    params, spec = hub.shapes(shape), LoRA(rank=2, alpha=3.0)
    adapter, own = random(params, spec), models.FAMILIES[family]
    hub.export_adapter(str(tmp_path), adapter, spec, family=own, base="x")
    back, found = hub.load_adapter(str(tmp_path), params, family=own, config=shape)
    same(back, adapter)
    assert found == spec


def test_the_file_has_pefts_names_and_transposed_matrices(folder, adapter):
    tensors = load_file(folder / FILE)
    assert len(tensors) == 4 * len(MODULES) * 2
    for here, there in MODULES.items():
        part, name = here.split("/")
        for layer in range(4):
            for letter in "ab":
                full = f"base_model.model.model.layers.{layer}.{there}.lora_{letter.upper()}.weight"
                ours = adapter["blocks"]["0-3"][part][name][letter][layer]
                np.testing.assert_array_equal(tensors[full], np.asarray(ours).T)
                assert tensors[full].dtype == np.float32


def test_the_config_says_what_peft_needs(folder):
    found = json.loads((folder / CONFIG).read_text())
    modules = found.pop("target_modules")
    assert modules == sorted(f"model.layers.{i}.{m}" for i in range(4) for m in MODULES.values())
    assert found == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "org/base",
        "r": 3,
        "lora_alpha": 12.0,
        "lora_dropout": 0.25,
        "use_rslora": True,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


def test_the_spec_comes_back_with_its_scale(folder, params, config):
    adapter, spec = load(folder, params, config)
    assert (spec.rank, spec.alpha, spec.dropout, spec.rslora) == (3, 12.0, 0.25, True)
    np.testing.assert_allclose(adapter["blocks"]["0-3"]["attn"]["q"]["scale"], np.full(4, 12 / np.sqrt(3)), rtol=1e-6)


def test_settings_at_values_that_change_nothing_are_accepted(folder, params, config):
    change(folder, use_dora=False, modules_to_save=None, rank_pattern={}, alpha_pattern={}, peft_version="0.20.0")
    plain = load(folder, params, config)[0]
    change(folder, init_lora_weights="gaussian", layers_to_transform=[0, 1], revision="main", lora_bias=False)
    for path, leaf in tree.flat(load(folder, params, config)[0]).items():
        np.testing.assert_array_equal(leaf, tree.flat(plain)[path])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_dora", True),
        ("bias", "all"),
        ("lora_bias", True),
        ("modules_to_save", ["lm_head"]),
        ("rank_pattern", {"q_proj": 4}),
        ("alpha_pattern", {"q_proj": 4}),
        ("fan_in_fan_out", True),
        ("trainable_token_indices", [1]),
        ("layer_replication", [[0, 4]]),
        ("a_key_of_the_future", 1),
        ("init_lora_weights", "pissa"),  # its adapter belongs to another base
        ("init_lora_weights", "olora"),
        ("alora_invocation_tokens", [7]),
        ("target_parameters", ["mlp.experts.gate_up_proj"]),
    ],
)
def test_a_setting_that_is_not_supported_is_refused_by_name(folder, params, config, key, value):
    change(folder, **{key: value})
    with pytest.raises(CheckpointError, match=rf"{CONFIG} sets '{key}' to .*, which is not supported"):
        load(folder, params, config)


def test_another_kind_of_adapter_is_refused(folder, params, config):
    change(folder, peft_type="IA3")
    with pytest.raises(CheckpointError, match="peft_type 'IA3'; only LORA is supported"):
        load(folder, params, config)


def test_layers_that_a_file_leaves_out_get_a_zero_adapter(folder, adapter, params, config):
    rewrite(folder, lambda t: [t.pop(name) for name in list(t) if ".layers.1." in name or ".layers.3." in name])
    back = tree.flat(load(folder, params, config)[0])
    for path, leaf in tree.flat(adapter).items():
        for layer in range(4):
            kept = layer in (0, 2) or path.endswith("/scale")
            np.testing.assert_array_equal(back[path][layer], leaf[layer] if kept else np.zeros_like(leaf[layer]))


def test_an_adapter_lands_in_the_stacks_of_a_cut_model(folder, adapter, params, config):
    cut = jax.eval_shape(lambda p: models.split(p, 1), params)
    back = load(folder, cut, config)[0]
    assert list(back["blocks"]) == ["0-0", "1-3"]
    same({"blocks": back["blocks"]}, {"blocks": models.split({"blocks": adapter["blocks"]}, 1)["blocks"]})


Q1 = "base_model.model.model.layers.1.self_attn.q_proj"


def rename(t, old, new):
    t[new] = t.pop(old)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda t: t.update({f"{Q1}.lora_A.weight": np.zeros((4, 32), np.float32)}),
            r"'base_model.*q_proj.lora_A.weight' in .* has shape \(4, 32\); \(3, 32\) was expected",
        ),
        (
            lambda t: t.update({f"{Q1}.lora_B.weight": np.zeros((3, 32), np.float32)}),
            r"lora_B.weight' in .* has shape \(3, 32\); \(32, 3\) was expected",
        ),
        (lambda t: t[f"{Q1}.lora_B.weight"].fill(np.nan), "lora_B.weight' in .* holds NaN or infinite numbers"),
        (
            lambda t: rename(t, f"{Q1}.lora_A.weight", f"{Q1.replace('1', '7')}.lora_A.weight"),
            r"layers.7.self_attn.q_proj.lora_A.weight', which fits no kernel of the base",
        ),
        (
            lambda t: rename(t, f"{Q1}.lora_A.weight", f"{Q1}.lora_magnitude_vector"),
            "lora_magnitude_vector', which fits no kernel of the base",
        ),
        (lambda t: t.update(x=np.zeros(3, np.float32)), "has 'x', which fits no kernel of the base"),
        (lambda t: [t.pop(name) for name in list(t) if "q_proj.lora_B" in name], "lacks a half of .*q"),
        (lambda t: [t.pop(name) for name in list(t) if "q_proj.lora_A" in name], "lacks a half of .*q"),
        (lambda t: t.pop(f"{Q1}.lora_A.weight"), "lacks a half of"),
        (lambda t: t.pop(f"{Q1}.lora_B.weight"), "lacks a half of"),
        (lambda t: t.clear(), "lacks a half of everything"),
    ],
)
def test_a_tensor_that_is_wrong_or_missing_is_refused(folder, params, config, spoil, message):
    rewrite(folder, spoil)
    with pytest.raises(CheckpointError, match=message):
        load(folder, params, config)


@pytest.mark.parametrize("rank", [2, 8])
def test_a_rank_in_the_config_that_is_not_the_files_is_refused(folder, params, config, rank):
    change(folder, r=rank)
    with pytest.raises(CheckpointError, match=r"has shape .* was expected"):
        load(folder, params, config)


def test_an_adapter_of_a_wider_model_is_refused(tiny, folder):
    wide = hub.read_config(tiny("llama", hidden_size=64, head_dim=8))[1]
    with pytest.raises(CheckpointError, match=r"lora_[AB].weight' in .* has shape .*; .* was expected"):
        load(folder, hub.shapes(wide), wide)


def test_folders_that_hold_no_adapter_are_refused(folder, params, config, tmp_path):
    with pytest.raises(CheckpointError, match="no adapter folder '.*none'; give one with adapter_config.json and"):
        load(tmp_path / "none", params, config)
    (folder / FILE).unlink()
    with pytest.raises(CheckpointError, match="has neither adapter_model.safetensors"):
        load(folder, params, config)
    (folder / CONFIG).unlink()
    with pytest.raises(CheckpointError, match="has no adapter_config.json"):
        load(folder, params, config)
