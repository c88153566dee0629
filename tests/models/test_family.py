import dataclasses

import pytest

from jaxsft import models
from jaxsft.models import FAMILIES, family_of
from jaxsft.models.rope import Rope

SHAPE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}
# What the families that are not Llama in other clothes have on their own.
GEMMAS = ("gemma", "gemma2", "gemma3_text")
QK_NORM = {"qwen3": "head", "qwen3_moe": "head", "gemma3_text": "head", "olmo2": "all"}
HEAD_DIM = {"qwen3": 128, "gpt_oss": 64} | dict.fromkeys(GEMMAS, 256)
THETA = {"smollm3": 2_000_000.0, "mixtral": 1_000_000.0, "gemma3_text": 1_000_000.0}
EPS = dict.fromkeys(("olmo2", "mixtral", "phi3", "gpt_oss"), 1e-5)
BIASED = ("qwen2", "qwen2_moe", "gpt_oss")
MOE = ("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss")
YARN = Rope(150_000.0, "yarn", 32.0, original_max_position=4096, truncate=False)
WINDOWS = {"gpt_oss": (128, None, 128, None), "gemma2": (4096, None, 4096, None), "gemma3_text": (4096,) * 4}
WINDOWED = {"use_sliding_window": True, "sliding_window": 6}
QWENS = ["qwen2", "qwen3"]


def read(family, **keys):
    return FAMILIES[family].read_config({**SHAPE, "model_type": family, **keys})


@pytest.fixture(params=[name for name, family in FAMILIES.items() if family.task and name != "gpt2"])
def family(request):
    """A family of decoders whose config has Llama's keys."""
    return request.param


def test_a_config_reads_into_the_shape_it_describes(family):
    more: dict = {"sliding_window": None} if family in ("mistral", *WINDOWS) else {}
    found = read(family, head_dim=16, tie_word_embeddings=True, hidden_act="relu", **more)
    expected = (96, 32, 48, 4, 4, 2, 16, 256)
    assert dataclasses.astuple(found)[:8] == expected
    assert (found.norm_eps, found.tied, found.activation) == (1e-5, True, "relu")
    assert (found.qkv_bias, found.qk_norm) == (family in BIASED, QK_NORM.get(family, ""))
    assert (found.pre_norm, found.post_norm) == (family != "olmo2", family in ("gemma2", "gemma3_text", "olmo2"))
    assert found.norm_from_zero == (family in GEMMAS)
    assert found.embed_scale == (32**0.5 if family in GEMMAS else 1)
    assert found.windows is None
    assert (found.moe is not None) == (family in MOE)
    assert (found.fused, found.sinks) == (family == "phi3", family == "gpt_oss")


def test_keys_that_a_config_leaves_out_take_the_familys_defaults(family):
    sparse = {k: v for k, v in SHAPE.items() if k not in ("num_key_value_heads", "hidden_act", "rms_norm_eps")}
    found = FAMILIES[family].read_config({**sparse, "model_type": family})
    activation = "gelu_pytorch_tanh" if family in GEMMAS else "silu"
    eps = EPS.get(family, 1e-6)
    assert (found.kv_heads, found.activation, found.norm_eps) == (4, activation, eps)
    assert found.head_dim == HEAD_DIM.get(family, 8)
    assert found.rope == (YARN if family == "gpt_oss" else Rope(theta=THETA.get(family, 10_000.0)))
    assert found.tied == (family in (*GEMMAS, "smollm3"))
    assert found.windows == WINDOWS.get(family, (4096,) * 4 if family == "mistral" else None)


def test_bookkeeping_keys_are_harmless(family):
    keys = {"architectures": ["X"], "torch_dtype": "bfloat16", "bos_token_id": 1, "transformers_version": "4.50.0"}
    assert read(family, **keys) == read(family)


def test_an_unknown_key_is_named_with_its_value(family):
    with pytest.raises(ValueError, match=rf"'{family}' has keys this family does not know: 'logit_softcap' = 30.0"):
        read(family, logit_softcap=30.0)


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"])
def test_a_missing_key_is_named_with_one_that_may_mean_it(family, key):
    config = {k: v for k, v in SHAPE.items() if k != key} | {"model_type": family, f"n_{key}": 4}
    with pytest.raises(ValueError, match=f"has no '{key}', which '{family}' models need; did 'n_{key}' mean it?"):
        FAMILIES[family].read_config(config)


@pytest.mark.parametrize("kind", ["gpt_neox", None])
def test_an_unknown_model_type_lists_the_known_ones(kind):
    with pytest.raises(
        ValueError, match=f"model_type {kind!r} is not supported; supported are bert, .*llama, mistral, "
    ):
        family_of({"model_type": kind})


@pytest.mark.parametrize("family", FAMILIES)
def test_a_known_model_type_gives_its_family(family):
    assert family_of({"model_type": family}) is FAMILIES[family]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"rope_theta": 5e5}, {"rope_theta": 5e5, "rope_type": "default"}),
        (
            {"rope_theta": 100.0, "rope_scaling": {"type": "linear", "factor": 4.0}},
            {"rope_theta": 100.0, "rope_type": "linear", "factor": 4.0},
        ),
        (
            {
                "rope_theta": 5e5,
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 32.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 128,
                },
            },
            {
                "rope_theta": 5e5,
                "rope_type": "llama3",
                "factor": 32.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 128,
            },
        ),
    ],
)
def test_rope_settings_of_transformers_4_and_5_agree(family, old, new):
    nested = {"full_attention": new} if family == "gemma3_text" else new
    old = {"rope_scaling": {"type": "default"}, **old}  # what gpt-oss does without any is yarn
    first, second = read(family, **old).rope, read(family, rope_parameters=nested).rope
    assert first == second
    assert first.theta == old["rope_theta"]
    assert first.factor == new.get("factor", 1.0)
    assert first.original_max_position == new.get("original_max_position_embeddings", 8192)


@pytest.mark.parametrize("kind", ["ntk", "none"])
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_an_unknown_rope_type_is_refused(family, kind, key):
    scaling = {"rope_type": kind, "factor": 2.0}
    nested = {"full_attention": scaling} if (family, key) == ("gemma3_text", "rope_parameters") else scaling
    with pytest.raises(
        ValueError, match=f"asks for rope type '{kind}'; known are default, linear, llama3, yarn, dynamic"
    ):
        read(family, **{key: nested})


def test_yarn_is_read_with_all_it_needs():
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 16.0}
    found = read("llama", rope_scaling=scaling).rope
    assert (found.kind, found.factor, found.original_max_position, found.beta_fast) == ("yarn", 4.0, 64, 16.0)
    del scaling["original_max_position_embeddings"]
    with pytest.raises(ValueError, match="rope type 'yarn' without its 'original_max_position_embeddings'"):
        read("llama", rope_scaling=scaling)


def test_dynamic_stretches_from_the_longest_position_on_and_reads_further():
    found = read("llama", rope_scaling={"type": "dynamic", "factor": 4.0})
    assert (found.rope.kind, found.rope.original_max_position, found.max_position) == ("dynamic", 256, 1024)


@pytest.mark.parametrize("kind", ["longrope", "su", "yarn"])
def test_longrope_of_phi_3_takes_its_original_length_from_beside_the_rope(kind):
    scaling = {"type": kind, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    found = read("phi3", rope_scaling=scaling, original_max_position_embeddings=64, partial_rotary_factor=0.75).rope
    assert (found.kind, found.original_max_position, found.factor) == ("longrope", 64, 4.0)
    assert (found.short_factor, found.long_factor, found.partial) == ((1.0,) * 4, (2.0,) * 4, 0.75)
    del scaling["long_factor"]
    with pytest.raises(ValueError, match="'longrope' without its 'long_factor'"):
        read("phi3", rope_scaling=scaling)


def test_the_mixtures_read_their_experts():
    keys = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 20, "router_aux_loss_coef": 0.5}
    two = read("qwen2_moe", shared_expert_intermediate_size=40, **keys).moe
    assert (two.experts, two.active, two.hidden, two.shared, two.normalised, two.balance) == (6, 3, 20, 40, False, 0.5)
    three = read("qwen3_moe", decoder_sparse_step=2, norm_topk_prob=True, **keys).moe
    assert (three.dense, three.normalised, three.shared) == ((0, 2), True, 0)
    eight = read("mixtral").moe
    assert (eight.experts, eight.active, eight.hidden, eight.normalised) == (8, 2, 48, True)
    with pytest.raises(ValueError, match="sets 'router_jitter_noise' to 0.1"):
        read("mixtral", router_jitter_noise=0.1)


def test_gpt_2_reads_its_own_names():
    sizes = {"n_embd": 32, "n_head": 4, "n_layer": 3, "n_positions": 64, "vocab_size": 96}
    read = FAMILIES["gpt2"].read_config
    found = read({"model_type": "gpt2", **sizes, "attn_pdrop": 0.1, "summary_type": "cls_index"})
    assert dataclasses.astuple(found)[:8] == (96, 32, 128, 3, 4, 4, 8, 64)
    assert (found.norm, found.gated, found.fused, found.learned_positions, found.tied) == (
        "layer",
        False,
        True,
        True,
        True,
    )
    assert (found.rope.kind, found.activation) == ("none", "gelu_new")
    with pytest.raises(ValueError, match="sets 'scale_attn_by_inverse_layer_idx' to True"):
        read({"model_type": "gpt2", **sizes, "scale_attn_by_inverse_layer_idx": True})


def test_gemma_2_and_3_have_their_own_scales_caps_windows_and_ropes():
    two = read("gemma2", head_dim=16, query_pre_attn_scalar=64, sliding_window=6)
    assert (two.attn_scale, two.attn_soft_cap, two.logit_soft_cap) == (1 / 8, 50.0, 30.0)
    assert two.windows == (6, None, 6, None)
    assert read("gemma2", final_logit_softcapping=None).logit_soft_cap is None
    three = read("gemma3_text", num_hidden_layers=7, sliding_window=6, rope_theta=5e5, rope_local_base_freq=99.0)
    assert three.windows == (6,) * 5 + (None, 6)
    assert [rope.theta for rope in three.ropes] == [99.0] * 5 + [5e5, 99.0]
    with pytest.raises(ValueError, match="sets 'attn_logit_softcapping' to 50.0; only None is supported"):
        read("gemma3_text", attn_logit_softcapping=50.0)
    with pytest.raises(ValueError, match="kinds of layers that are not known: rope_type"):
        read("gemma3_text", rope_parameters={"rope_type": "default"})


def test_the_first_gemmas_gelu_is_the_tanh_form():
    assert read("gemma", hidden_act="gelu").activation == "gelu_pytorch_tanh"
    assert read("gemma", hidden_act="gelu", hidden_activation="gelu").activation == "gelu"


def test_granite_has_four_multipliers():
    keys = {"embedding_multiplier": 12, "attention_multiplier": 0.1, "residual_multiplier": 0.2, "logits_scaling": 4}
    found = read("granite", **keys)
    assert (found.embed_scale, found.attn_scale, found.residual_scale, found.logit_scale) == (12, 0.1, 0.2, 0.25)


def test_smollm3_turns_no_heads_on_every_fourth_layer_or_where_it_says():
    kinds = lambda found: [rope.kind for rope in found.ropes or ()]
    assert kinds(read("smollm3")) == ["default", "default", "default", "none"]
    assert kinds(read("smollm3", no_rope_layers=[0, 1, 1, 0])) == ["none", "default", "default", "none"]
    assert read("smollm3", no_rope_layers=[1, 1, 1, 1]).ropes is None
    windowed = read("smollm3", use_sliding_window=True, sliding_window=6, no_rope_layer_interval=2)
    assert windowed.windows == (None, 6, None, 6)
    with pytest.raises(ValueError, match="no_rope_layers names 3 of 4 layers"):
        read("smollm3", no_rope_layers=[1, 1, 1])


def test_an_unknown_rope_setting_is_refused(family):
    with pytest.raises(ValueError, match="rope settings have keys that are not known: beta_fast"):
        read(family, rope_scaling={"rope_type": "linear", "factor": 2.0, "beta_fast": 32})


def test_biases_follow_the_config():
    found = read("llama", attention_bias=True, mlp_bias=True)
    assert (found.qkv_bias, found.out_bias, found.mlp_bias) == (True, True, True)
    assert (read("qwen2").qkv_bias, read("qwen2").out_bias) == (True, False)
    assert (read("qwen3", attention_bias=True).qkv_bias, read("qwen3", attention_bias=True).out_bias) == (True, True)


def test_mistral_has_its_window_on_every_layer_or_on_none():
    assert read("mistral", sliding_window=6).windows == (6, 6, 6, 6)
    assert read("mistral", sliding_window=None).windows is None


@pytest.mark.parametrize("family", QWENS)
def test_layer_types_say_which_layers_have_the_window(family):
    types = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    assert read(family, layer_types=types, **WINDOWED).windows == (None, 6, None, 6)
    assert read(family, max_window_layers=3, **WINDOWED).windows == (None, None, None, 6)
    assert read(family, max_window_layers=0, sliding_window=6, use_sliding_window=False).windows is None


@pytest.mark.parametrize("family", QWENS)
def test_layer_types_must_be_known_and_as_many_as_layers(family):
    with pytest.raises(ValueError, match="layer types that are not known: linear_attention"):
        read(family, layer_types=["full_attention"] * 3 + ["linear_attention"])
    with pytest.raises(ValueError, match="names 3 layer types for 4 layers"):
        read(family, layer_types=["full_attention"] * 3)


@pytest.mark.parametrize(
    ("family", "key", "value"), [("llama", "rope_interleaved", True), ("qwen2", "use_mrope", True)]
)
def test_a_key_known_at_one_value_only_is_refused_at_another(family, key, value):
    assert read(family, **{key: not value}) == read(family)
    with pytest.raises(ValueError, match=f"sets '{key}' to {value!r}; only False is supported for this family"):
        read(family, **{key: value})


@pytest.mark.parametrize("family", FAMILIES)
def test_every_familys_names_are_distinct_and_stacked_where_they_have_a_layer(family):
    names = FAMILIES[family].names
    assert len({n.path for n in names}) == len({n.hf for n in names}) == len(names)
    for name in names:
        assert name.path.startswith("blocks/") == ("{layer}" in name.hf)
        as_here = family == "gpt2" or (family == "gpt_oss" and "/experts/" in name.path)
        as_here &= name.path != "score/kernel"  # a torch Linear everywhere
        assert name.transposed == (name.path.endswith("/kernel") and not as_here)


JUDGE = ["LlamaForSequenceClassification"]


@pytest.mark.parametrize("said", [
    {"num_labels": 1},
    {"id2label": {"0": "reward"}, "label2id": {"reward": 0}},
    {"id2label": {"0": "LABEL_0"}, "num_labels": 1},
])  # fmt: skip
def test_a_classifier_of_one_label_is_a_reward_model(family, said):
    assert read(family, architectures=JUDGE, **said).labels == 1
    assert read(family, **said).labels == 0  # as a language model says too


@pytest.mark.parametrize(("said", "count"), [
    ({}, 2),  # what transformers means by nothing
    ({"num_labels": 3}, 3),
    ({"id2label": {"0": "bad", "1": "good"}}, 2),
    ({"id2label": {"0": "bad", "1": "good"}, "num_labels": 1}, 2),
])  # fmt: skip
def test_a_classifier_of_several_labels_is_refused_by_name(family, said, count):
    with pytest.raises(ValueError, match=f"names LlamaForSequenceClassification with {count} labels .*only reward mod"):
        read(family, architectures=JUDGE, **said)


def test_a_model_may_lose_its_output_layer_and_not_gain_one():
    llama, judge = FAMILIES["llama"], read("llama", architectures=JUDGE, num_labels=1)
    plain = read("llama", tie_word_embeddings=True)
    assert models.with_labels(llama, plain, 1) == judge == models.with_labels(llama, judge, None)
    assert models.with_labels(llama, plain, None) == plain == models.with_labels(llama, plain, 0)
    with pytest.raises(ValueError, match="has no output layer; choose a ...ForCausalLM"):
        models.with_labels(llama, judge, 0)
    with pytest.raises(ValueError, match="labels is 3; it must be 1, a reward model, or 0, a language model"):
        models.with_labels(llama, plain, 3)


def test_the_registry_is_what_the_models_module_lists():
    assert set(models.FAMILIES) >= {"llama", "mistral", "qwen2", "qwen3"}
