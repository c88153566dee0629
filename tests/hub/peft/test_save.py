import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxsft import hub, lora, models, tree
from jaxsft.hub import CheckpointError
from jaxsft.hub.peft.names import CONFIG, FILE
from jaxsft.lora import LoRA

from .conftest import FAMILY, MODULES, PREFIX, SPEC, random


def export(folder, adapter, spec, base="org/base", **more):
    """The tensors and the configuration of an exported folder."""
    hub.export_adapter(str(folder), adapter, spec, family=FAMILY, base=str(base), **more)
    return load_file(folder / FILE), json.loads((folder / CONFIG).read_text())


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


def test_dora_has_a_vector_for_each_module(weights, tmp_path):
    spec = LoRA(rank=2, dora=True, targets=".*/q|embed|head")
    adapter = random(weights, spec)
    tensors, config = export(tmp_path, adapter, spec)
    assert config["use_dora"] is True
    layer = adapter["blocks"]["0-3"]["attn"]["q"]
    vector = "lora_magnitude_vector"
    np.testing.assert_array_equal(tensors[f"{PREFIX}model.layers.2.self_attn.q_proj.{vector}"], layer["m"][2])
    np.testing.assert_array_equal(tensors[f"{PREFIX}model.embed_tokens.{vector}"], adapter["embed"]["m"])
    np.testing.assert_array_equal(tensors[f"{PREFIX}lm_head.{vector}"], adapter["head"]["m"])


def test_an_embedding_and_an_output_layer_have_names_of_their_own(params, tmp_path):
    adapter = random(params, LoRA(rank=2, targets="embed|head"))
    tensors, config = export(tmp_path, adapter, LoRA(rank=2))
    assert config["target_modules"] == ["lm_head", "model.embed_tokens"]
    expected = {
        "model.embed_tokens.lora_embedding_A": adapter["embed"]["a"].T,
        "model.embed_tokens.lora_embedding_B": adapter["embed"]["b"].T,
        "lm_head.lora_A.weight": adapter["head"]["a"].T,
        "lm_head.lora_B.weight": adapter["head"]["b"].T,
    }
    assert {f"{PREFIX}{name}" for name in expected} == set(tensors)
    for name, value in expected.items():
        np.testing.assert_array_equal(tensors[PREFIX + name], value)


def test_pissa_is_a_lora_of_twice_the_rank_over_the_original_base(weights, tmp_path):
    spec = LoRA(rank=2, alpha=6.0, init="pissa", targets=".*/q")
    adapter = random(weights, spec)
    tensors, config = export(tmp_path, adapter, spec)
    assert (config["r"], config["lora_alpha"]) == (4, 12.0)
    assert "init_lora_weights" not in config
    q = {name: leaf[1] for name, leaf in adapter["blocks"]["0-3"]["attn"]["q"].items()}
    a, b = (tensors[f"{PREFIX}model.layers.1.self_attn.q_proj.lora_{half}.weight"] for half in "AB")
    np.testing.assert_allclose(b @ a, (q["a"] @ q["b"] - q["a0"] @ q["b0"]).T, atol=1e-5)


def test_ranks_that_are_zero_on_both_sides_are_left_out(params, tmp_path):
    adapter = random(params, LoRA(rank=4, alpha=8.0, targets=".*/(q|v)"))
    q, v = (adapter["blocks"]["0-3"]["attn"][name] for name in "qv")
    q["a"][0, :, 2:], q["b"][0, 2:] = 0, 0  # two ranks of four
    q["a"][1, :, 3], v["b"][1, 3] = 0, 0  # one half alone is alive
    q["a"][3], q["b"][3] = 0, 0  # no adapter at all
    tensors, config = export(tmp_path, adapter, LoRA(rank=4, alpha=8.0))
    ranks = {name: x.shape[0] for name, x in tensors.items() if "lora_A" in name}
    at = lambda layer, name: f"{PREFIX}model.layers.{layer}.self_attn.{name}_proj.lora_A.weight"
    assert ranks == {at(i, name): 4 for i in range(4) for name in "qv" if (i, name) != (3, "q")} | {at(0, "q"): 2}
    assert config["rank_pattern"] == {"model.layers.0.self_attn.q_proj": 2}
    assert config["alpha_pattern"] == {"model.layers.0.self_attn.q_proj": 4.0}  # the scale stays 2
    assert "model.layers.3.self_attn.q_proj" not in config["target_modules"]


def test_what_trained_beside_the_adapter_is_saved_as_whole_modules(base, weights, adapter, tmp_path):
    stack = weights["blocks"]["0-3"]
    trained = {
        "norm": {"scale": 2 * np.asarray(weights["norm"]["scale"])},
        "blocks": {"0-3": {"attn": {"k": {"kernel": 2 * np.asarray(stack["attn"]["k"]["kernel"])}}}},
    }
    tensors, config = export(tmp_path, adapter, SPEC, base, trained=trained)
    modules = [f"model.layers.{i}.self_attn.k_proj" for i in range(4)] + ["model.norm"]
    assert config["modules_to_save"] == modules
    assert (config["bias"], "ensure_weight_tying" in config) == ("none", False)
    raw = load_file(base / "model.safetensors")
    saved = {name.removeprefix(PREFIX): x for name, x in tensors.items() if "lora_" not in name}
    assert saved.keys() == {f"{module}.weight" for module in modules} | {f"{module}.bias" for module in modules[:-1]}
    for name, value in saved.items():  # a bias that did not train is the base's
        np.testing.assert_array_equal(value, raw[name] * (2 if name.endswith("weight") else 1))


@pytest.mark.parametrize(("biases", "key"), [(["q"], "lora_only"), (["q", "o"], "all")])
def test_biases_that_trained_alone_are_pefts_biases(weights, adapter, tmp_path, biases, key):
    stack = weights["blocks"]["0-3"]["attn"]
    trained = {"blocks": {"0-3": {"attn": {name: {"bias": 1 + np.asarray(stack[name]["bias"])} for name in biases}}}}
    tensors, config = export(tmp_path, adapter, SPEC, trained=trained)
    assert config["bias"] == key
    assert "modules_to_save" not in config
    names = {"q": "self_attn.q_proj.base_layer.bias", "o": "self_attn.o_proj.bias"}  # o has no adapter
    saved = {name for name in tensors if "lora_" not in name}
    assert saved == {f"{PREFIX}model.layers.{i}.{names[name]}" for i in range(4) for name in biases}


def test_a_tied_table_is_saved_twice_with_the_key_that_ties_it(tied, adapter, tmp_path):
    table = 2 * np.asarray(hub.on_disk(str(tied))["embed"]["table"])
    tensors, config = export(tmp_path / "tied", adapter, SPEC, tied, trained={"embed": {"table": table}})
    assert config["modules_to_save"] == ["model.embed_tokens"]
    assert config["ensure_weight_tying"] is True
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        np.testing.assert_array_equal(tensors[PREFIX + name], table)
    # A table for the lookup alone: that of the output layer is still the base's.
    both = {"embed": {"table": table}, "head": {"table": table / 2}}
    tensors, config = export(tmp_path / "parted", adapter, SPEC, tied, trained=both)
    assert "ensure_weight_tying" not in config
    assert f"{PREFIX}lm_head.weight" not in tensors


SCORE = {"score": {"kernel": np.arange(32, dtype=np.float32)[:, None]}}


def test_a_score_makes_it_the_adapter_of_a_reward_model(adapter, params, tied, tmp_path):
    tensors, config = export(tmp_path / "plain", adapter, SPEC, trained=SCORE)  # the base need not be at hand
    assert (config["task_type"], config["modules_to_save"]) == ("SEQ_CLS", ["score"])
    np.testing.assert_array_equal(tensors[f"{PREFIX}score.weight"], SCORE["score"]["kernel"].T)
    # A tied table has no second name where there is no output layer.
    table = 2 * np.asarray(hub.on_disk(str(tied))["embed"]["table"])
    tensors, config = export(tmp_path / "table", adapter, SPEC, tied, trained={"embed": {"table": table}, **SCORE})
    assert config["modules_to_save"] == ["model.embed_tokens", "score"]
    assert "ensure_weight_tying" not in config
    assert {name.removeprefix(PREFIX) for name in tensors if "lora_" not in name} == {
        "model.embed_tokens.weight",
        "score.weight",
    }


def test_a_score_that_rested_is_the_bases(base, adapter, config, tmp_path):
    kernel = SCORE["score"]["kernel"]
    hub.merge(str(base), str(tmp_path / "judge"), trained=SCORE)
    judge = hub.read_config(tmp_path / "judge")[1]
    tensors, said = export(tmp_path / "adapter", adapter, SPEC, tmp_path / "judge", config=judge)
    assert (said["task_type"], said["modules_to_save"]) == ("SEQ_CLS", ["score"])
    np.testing.assert_array_equal(tensors[f"{PREFIX}score.weight"], kernel.T)
    with pytest.raises(CheckpointError, match="neither what trained nor .* has a score; give it among `trained`"):
        export(tmp_path / "not", adapter, SPEC, base, config=judge)


def test_a_family_without_a_reward_model_in_transformers_has_no_adapter_of_one(adapter, tmp_path):
    granite = models.FAMILIES["granite"]
    with pytest.raises(CheckpointError, match="transformers has no reward model of this family, so PEFT could not"):
        hub.export_adapter(str(tmp_path), adapter, SPEC, family=granite, base="org/base", trained=SCORE)


def test_what_peft_cannot_hold_is_refused(params, weights, adapter, tmp_path):
    zeros = jax.tree.map(np.zeros_like, adapter)
    with pytest.raises(CheckpointError, match="holds zeros alone"):
        export(tmp_path, zeros, SPEC)
    both = random(weights, LoRA(rank=2, targets=".*/q", dora=True))
    mixed = tree.combine(both, random(params, LoRA(rank=2, targets=".*/v")))
    with pytest.raises(CheckpointError, match="some layers of the adapter are DoRA and some are not"):
        export(tmp_path, mixed, SPEC)
    kernel = {"blocks": {"0-3": {"attn": {"q": {"kernel": weights["blocks"]["0-3"]["attn"]["q"]["kernel"]}}}}}
    with pytest.raises(CheckpointError, match=r"layers.0.self_attn.q_proj.weight trained beside its own adapter"):
        export(tmp_path, adapter, SPEC, trained=kernel)


def test_a_fresh_adapter_is_exported_whole(params, tmp_path):
    spec = LoRA(rank=3, targets=".*/q|embed|head")
    fresh = lora.init(jax.random.key(0), params, spec)  # B of the linear ones is zero, and A of the embedding
    tensors, config = export(tmp_path, fresh, spec)
    assert (config["r"], "rank_pattern" in config, len(tensors)) == (3, False, 12)
