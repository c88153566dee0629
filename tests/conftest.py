"""Eight CPU devices and no network for every test, and tiny random checkpoints in Hugging Face's format."""

import atexit
import os
import shutil
import tempfile

# Tests wait for the compiler and hardly for what it makes. Without LLVM's optimisations, and without the emitters that
# lower every fusion through MLIR, a training step of a tiny model compiles in half the time. Rounding differs in
# the last bits, nothing else does. What XLA_FLAGS says already comes later and wins: with
# `--xla_backend_optimization_level=3 --xla_cpu_use_fusion_emitters=true` tests compile as runs do. Scripts that are
# started as processes always do, see scripts/conftest.py.
os.environ["XLA_FLAGS"] = (
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false "
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
)
# Eight devices take their collectives from one pool of threads, as many as there are devices or cores. Two collectives
# that do not wait for each other may come up in another order on each device; once every thread waits for a device that
# has none left, XLA aborts the process. More threads than can wait at once rule that out.
os.environ.setdefault("NPROC", "64")
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["JAXSFT_CACHE"] = tempfile.mkdtemp(prefix="jaxsft-tests-")

import json
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

atexit.register(shutil.rmtree, os.environ["JAXSFT_CACHE"], ignore_errors=True)

BASE = Path(__file__).parents[1] / "jaxsft" / "assets" / "base"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
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
    "rope_theta": 10_000.0,
    "bos_token_id": None,
    "eos_token_id": 2,
}
GPT2 = {"vocab_size": 96, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 256, "eos_token_id": 2}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}
ENCODER = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-5,
    "hidden_act": "gelu",
}
SHAPES = {"gpt2": GPT2, "bert": ENCODER, "roberta": ENCODER}  # of the families that have no SHAPE
# What each family's own config has beside SHAPE.
OWN: dict[str, dict[str, Any]] = {
    "llama": {"architectures": ["LlamaForCausalLM"], "attention_bias": False, "mlp_bias": False},
    "mistral": {"architectures": ["MistralForCausalLM"], "sliding_window": 6},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": False, "sliding_window": 6},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "head_dim": 8, "attention_bias": False},
    "gemma": {"architectures": ["GemmaForCausalLM"], "head_dim": 8},
    "gemma2": {"architectures": ["Gemma2ForCausalLM"], "head_dim": 8, "sliding_window": 6},
    "gemma3_text": {"architectures": ["Gemma3ForCausalLM"], "head_dim": 8, "sliding_window": 6},
    "gpt2": {"architectures": ["GPT2LMHeadModel"]},
    "gpt_oss": {
        "architectures": ["GptOssForCausalLM"],
        "head_dim": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 6,
    },
    "mixtral": {"architectures": ["MixtralForCausalLM"], "num_local_experts": 4, "num_experts_per_tok": 2},
    "phi3": {"architectures": ["Phi3ForCausalLM"]},
    "qwen2_moe": {"architectures": ["Qwen2MoeForCausalLM"], "shared_expert_intermediate_size": 40, **MOE},
    "qwen3_moe": {"architectures": ["Qwen3MoeForCausalLM"], "head_dim": 8, "mlp_only_layers": [0], **MOE},
    "granite": {"architectures": ["GraniteForCausalLM"], "residual_multiplier": 0.5, "logits_scaling": 2.0},
    "olmo2": {"architectures": ["Olmo2ForCausalLM"]},
    "smollm3": {"architectures": ["SmolLM3ForCausalLM"]},
    "bert": {"architectures": ["BertForMaskedLM"], "pad_token_id": 0},
    "roberta": {"architectures": ["RobertaForMaskedLM"], "pad_token_id": 1},
}
ENCODERS = ("bert", "roberta")
MAPS = Path("/proc/self/maps")


def pytest_runtest_teardown():
    """Forgets compiled programs before they fill the process's memory maps.

    Linux gives a process 65,530 of them (vm.max_map_count). A compiled program takes about ten, and jax keeps the
    programs of every model that ever was; those of one model of the parity run take a thousand. Past the limit LLVM is
    refused memory, and XLA does not raise but dies of a segmentation fault.
    """
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > 16_000:
        jax.clear_caches()


def hf_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of a checkpoint, as transformers writes them."""
    D, M, V = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    H = config.get("head_dim", D // config["num_attention_heads"])
    N, K = config["num_attention_heads"] * H, config["num_key_value_heads"] * H
    kind = config["model_type"]
    qwen2 = kind in ("qwen2", "qwen2_moe")
    shapes = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (V, D)
    for layer in range(config["num_hidden_layers"]):
        dense = {
            "self_attn.q_proj": (N, D),
            "self_attn.k_proj": (K, D),
            "self_attn.v_proj": (K, D),
            "self_attn.o_proj": (D, N),
            "mlp.gate_proj": (M, D),
            "mlp.up_proj": (M, D),
            "mlp.down_proj": (D, M),
        }
        if kind == "phi3":
            dense = {
                "self_attn.qkv_proj": (N + 2 * K, D),
                "self_attn.o_proj": (D, N),
                "mlp.gate_up_proj": (2 * M, D),
                "mlp.down_proj": (D, M),
            }
        own = {}
        if "num_experts_per_tok" in config and layer not in config.get("mlp_only_layers", []):
            dense = {name: shape for name, shape in dense.items() if name.startswith("self_attn")}
            own = mixture_shapes(config)
        own |= {f"{name}.weight": shape for name, shape in dense.items()}
        norms = ["input_layernorm", "post_attention_layernorm"]
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"] * (kind in ("gemma2", "gemma3_text"))
        norms = ["post_attention_layernorm", "post_feedforward_layernorm"] if kind == "olmo2" else norms
        own |= {f"{name}.weight": (D,) for name in norms}
        biased = [name for name in dense if name.startswith("self_attn") and config.get("attention_bias")]
        biased += [name for name in dense if name.startswith("mlp") and config.get("mlp_bias")]
        biased += [name for name in dense if name[-6:] in ("q_proj", "k_proj", "v_proj") and qwen2]
        biased += [name for name in dense if name.startswith("self_attn") and kind == "gpt_oss"]
        own |= {f"{name}.bias": dense[name][:1] for name in biased}
        if kind == "gpt_oss":
            own["self_attn.sinks"] = (config["num_attention_heads"],)
        if kind in ("qwen3", "qwen3_moe", "gemma3_text"):
            own |= {"self_attn.q_norm.weight": (H,), "self_attn.k_norm.weight": (H,)}
        if kind == "olmo2":
            own |= {"self_attn.q_norm.weight": (N,), "self_attn.k_norm.weight": (K,)}
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in own.items()}
    return shapes


def mixture_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The tensors of one layer's mixture of experts."""
    D, M, kind = config["hidden_size"], config["intermediate_size"], config["model_type"]
    E, F = config.get("num_local_experts") or config["num_experts"], config.get("moe_intermediate_size", M)
    if kind == "gpt_oss":
        return {
            "mlp.router.weight": (E, D),
            "mlp.router.bias": (E,),
            "mlp.experts.gate_up_proj": (E, D, 2 * F),
            "mlp.experts.gate_up_proj_bias": (E, 2 * F),
            "mlp.experts.down_proj": (E, F, D),
            "mlp.experts.down_proj_bias": (E, D),
        }
    home, gate, up, down = "mlp", "gate_proj", "up_proj", "down_proj"
    if kind == "mixtral":
        home, gate, up, down = "block_sparse_moe", "w1", "w3", "w2"
    shapes: dict[str, tuple[int, ...]] = {f"{home}.gate.weight": (E, D)}
    for e in range(E):
        shapes |= {f"{home}.experts.{e}.{name}.weight": (F, D) for name in (gate, up)}
        shapes[f"{home}.experts.{e}.{down}.weight"] = (D, F)
    if kind == "qwen2_moe":
        S = config["shared_expert_intermediate_size"]
        shapes |= {f"mlp.shared_expert.{name}.weight": (S, D) for name in (gate, up)}
        shapes |= {f"mlp.shared_expert.{down}.weight": (D, S), "mlp.shared_expert_gate.weight": (1, D)}
    return shapes


def gpt2_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor of a GPT 2 checkpoint; kernels are [in, out]."""
    V, D, P = config["vocab_size"], config["n_embd"], config["n_positions"]
    shapes: dict[str, tuple[int, ...]] = {"transformer.wte.weight": (V, D), "transformer.wpe.weight": (P, D)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (V, D)
    for layer in range(config["n_layer"]):
        kernels = {"attn.c_attn": (D, 3 * D), "attn.c_proj": (D, D), "mlp.c_fc": (D, 4 * D), "mlp.c_proj": (4 * D, D)}
        own = {f"{name}.weight": shape for name, shape in kernels.items()}
        own |= {f"{name}.bias": shape[1:] for name, shape in kernels.items()}
        own |= {f"{name}.{part}": (D,) for name in ("ln_1", "ln_2") for part in ("weight", "bias")}
        shapes |= {f"transformer.h.{layer}.{name}": shape for name, shape in own.items()}
    return shapes | {"transformer.ln_f.weight": (D,), "transformer.ln_f.bias": (D,)}


def encoder_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The same of an encoder, with the head that its architecture names, and what nothing here computes."""
    D, M, V = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    kind, (architecture,) = config["model_type"], config["architectures"]
    dense = lambda name, out, into: {f"{name}.weight": (out, into), f"{name}.bias": (out,)}
    norm = lambda name: {f"{name}.weight": (D,), f"{name}.bias": (D,)}
    base = {
        "embeddings.word_embeddings.weight": (V, D),
        "embeddings.position_embeddings.weight": (config["max_position_embeddings"], D),
        "embeddings.token_type_embeddings.weight": (config["type_vocab_size"], D),
        **norm("embeddings.LayerNorm"),
    }
    for layer in range(config["num_hidden_layers"]):
        own = {}
        for name in ("query", "key", "value"):
            own |= dense(f"attention.self.{name}", D, D)
        own |= dense("attention.output.dense", D, D) | norm("attention.output.LayerNorm")
        own |= dense("intermediate.dense", M, D) | dense("output.dense", D, M) | norm("output.LayerNorm")
        base |= {f"encoder.layer.{layer}.{name}": shape for name, shape in own.items()}
    if architecture.endswith("Model"):
        return base | dense("pooler.dense", D, D)
    shapes = {f"{kind}.{name}": shape for name, shape in base.items()}
    if architecture == "BertForSequenceClassification":
        return shapes | dense("bert.pooler.dense", D, D) | dense("classifier", 1, D)
    if architecture == "RobertaForSequenceClassification":
        return shapes | dense("classifier.dense", D, D) | dense("classifier.out_proj", 1, D)
    if kind == "roberta":
        return shapes | dense("lm_head.dense", D, D) | norm("lm_head.layer_norm") | {"lm_head.bias": (V,)}
    head = "cls.predictions.transform"
    shapes |= dense(f"{head}.dense", D, D) | norm(f"{head}.LayerNorm") | {"cls.predictions.bias": (V,)}
    if architecture == "BertForPreTraining":
        shapes |= dense("bert.pooler.dense", D, D) | dense("cls.seq_relationship", 2, D)
    return shapes


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """tiny(family, ...) -> the folder of a new random checkpoint of four small layers.

    family: a name in `models.FAMILIES`; dtype: of the file's tensors; tied: no lm_head; tokenizer: copy that of
    jaxsft/assets/base (the vocabulary is then its 2560); seed: of the weights; others: keys of config.json.
    """

    def make(
        family: str = "llama",
        *,
        dtype: str = "float32",
        tied: bool = False,
        tokenizer: bool = False,
        seed: int = 0,
        **config: Any,
    ) -> Path:
        folder = tmp_path_factory.mktemp(family)
        size = {"vocab_size": 2560} if tokenizer else {}
        encodes = family in ENCODERS
        config = {**SHAPES.get(family, SHAPE), **OWN[family], **size, **config}
        config |= {"model_type": family, "torch_dtype": dtype, "tie_word_embeddings": tied or encodes}
        draw, tensors = np.random.default_rng(seed), {}
        for name, shape in (encoder_shapes if encodes else gpt2_shapes if family == "gpt2" else hf_shapes)(
            config
        ).items():
            noise = draw.standard_normal(shape, np.float32)
            scales = ("norm" in name.lower() or ".ln_" in name) and name.endswith("weight")
            tensors[name] = (1 + 0.3 * noise if scales else 0.2 * noise).astype(DTYPES[dtype])
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config, indent=2))
        for file in TOKENIZER if tokenizer else ():
            if (BASE / file).is_file():
                shutil.copyfile(BASE / file, folder / file)
        return folder

    return make
