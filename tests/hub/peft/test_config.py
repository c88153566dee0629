import dataclasses
import math

import numpy as np
import pytest

from jaxsft.hub import CheckpointError
from jaxsft.hub.peft.config import pattern_of, read_settings, to_config
from jaxsft.hub.peft.names import CONFIG
from jaxsft.lora import LoRA

from .conftest import SPEC, change, load, same


def test_the_spec_comes_back_with_its_scale(folder, params, config):
    adapter, spec, saved = load(folder, params, config)
    assert spec == dataclasses.replace(SPEC, targets="all")
    assert saved == {}
    np.testing.assert_allclose(adapter["blocks"]["0-3"]["attn"]["q"]["scale"], np.full(4, 12 / np.sqrt(3)), rtol=1e-6)


def test_settings_at_values_that_change_nothing_are_accepted(folder, params, config):
    plain = load(folder, params, config).lora
    change(folder, use_dora=False, modules_to_save=None, rank_pattern={}, alpha_pattern={}, peft_version="0.20.0")
    same(load(folder, params, config).lora, plain)
    change(folder, init_lora_weights="gaussian", layers_to_transform=[0, 1], revision="main", lora_bias=False)
    same(load(folder, params, config).lora, plain)
    change(folder, init_lora_weights="orthogonal", fan_in_fan_out=True, ensure_weight_tying=True, bias="lora_only")
    same(load(folder, params, config).lora, plain)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lora_bias", True),
        ("layer_replication", [[0, 4]]),
        ("a_key_of_the_future", 1),
        ("alora_invocation_tokens", [7]),
        ("target_parameters", ["mlp.experts.gate_up_proj"]),
        ("use_qalora", True),
        ("use_bdlora", {"nblocks": 2}),
        ("arrow_config", {"top_k": 3}),
        ("kasa_config", {"beta": 1e-4}),
        ("velora_config", {"rank": 1}),
        ("monteclora_config", {"num_samples": 8}),
        ("init_lora_weights", "corda"),  # these adapters belong to another base than the checkpoint
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "lora_ga"),
        ("init_lora_weights", "pissa_niter_16"),  # and this one to another base each time PEFT loads it
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


@pytest.mark.parametrize(
    ("patterns", "module", "found"),
    [
        (["q_proj", "layers.1.q_proj"], "model.layers.1.q_proj", "q_proj"),  # the first, not the longest
        (["q"], "model.layers.1.q_proj", None),  # whole parts of a name
        (["^model.layers.[12].*"], "model.layers.1.q_proj", "^model.layers.[12].*"),
        (["^layers.1.*"], "model.layers.1.q_proj", None),
        (["layers.1.q_proj"], "model.layers.11.q_proj", None),
        (["lm_head"], "lm_head", "lm_head"),
    ],
)
def test_a_pattern_matches_the_end_of_a_modules_name(patterns, module, found):
    assert pattern_of(dict.fromkeys(patterns), module) == (found or module)


def test_patterns_give_each_module_its_rank_and_scale(folder):
    change(folder, rank_pattern={"q_proj": 2}, alpha_pattern={"layers.0.*": 5, "q_proj": 7})
    settings = read_settings(folder)
    for module, rank, alpha in (
        ("model.layers.0.self_attn.q_proj", 2, 5.0),
        ("model.layers.1.self_attn.q_proj", 2, 7.0),
        ("model.layers.1.mlp.up_proj", 3, 12.0),
    ):
        assert settings.of(module).rank == rank
        assert settings.scale(module) == alpha / math.sqrt(rank)


@pytest.mark.parametrize("rslora", [False, True])
def test_what_most_modules_have_is_the_rule_and_others_get_patterns(tmp_path, rslora):
    width = math.sqrt if rslora else lambda r: r
    wanted = {"a.q": (4, 8.0), "b.q": (4, 8.0), "a.v": (4, 9.3), "b.v": (6, 8.0), "lm_head": (1, 3.0)}
    sizes = {module: (r, float(np.float32(alpha / width(r)))) for module, (r, alpha) in wanted.items()}
    made = to_config(sizes, LoRA(dropout=0.5, rslora=rslora), base="org/base", bias="", use_dora=True)
    assert (made["r"], made["lora_alpha"], made["use_rslora"], made["lora_dropout"]) == (4, 8.0, rslora, 0.5)
    assert made["rank_pattern"] == {"b.v": 6, "lm_head": 1}
    assert made["alpha_pattern"] == {"a.v": 9.3, "lm_head": 3.0}
    assert made["target_modules"] == sorted(wanted)
    assert (made["use_dora"], made["bias"]) == (True, "none")
