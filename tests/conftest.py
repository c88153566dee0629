"""Eight CPU devices and no network for every test, and tiny random checkpoints in Hugging Face's format."""

import atexit
import os
import shutil
import tempfile

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["JAXSFT_CACHE"] = tempfile.mkdtemp(prefix="jaxsft-tests-")

import json
from pathlib import Path
from typing import Any

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
# What each family's own config has beside SHAPE, or ENCODER.
OWN: dict[str, dict[str, Any]] = {
    "llama": {"architectures": ["LlamaForCausalLM"], "attention_bias": False, "mlp_bias": False},
    "mistral": {"architectures": ["MistralForCausalLM"], "sliding_window": 6},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": False, "sliding_window": 6},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "head_dim": 8, "attention_bias": False},
    "gemma": {"architectures": ["GemmaForCausalLM"], "head_dim": 8},
    "gemma2": {"architectures": ["Gemma2ForCausalLM"], "head_dim": 8, "sliding_window": 6},
    "gemma3_text": {"architectures": ["Gemma3ForCausalLM"], "head_dim": 8, "sliding_window": 6},
    "granite": {"architectures": ["GraniteForCausalLM"], "residual_multiplier": 0.5, "logits_scaling": 2.0},
    "olmo2": {"architectures": ["Olmo2ForCausalLM"]},
    "smollm3": {"architectures": ["SmolLM3ForCausalLM"]},
    "bert": {"architectures": ["BertForMaskedLM"], "pad_token_id": 0},
    "roberta": {"architectures": ["RobertaForMaskedLM"], "pad_token_id": 1},
}
ENCODERS = ("bert", "roberta")


def hf_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of a checkpoint, as transformers writes them."""
    D, M, V = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    H = config.get("head_dim", D // config["num_attention_heads"])
    N, K = config["num_attention_heads"] * H, config["num_key_value_heads"] * H
    kind = config["model_type"]
    qwen2 = kind == "qwen2"
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
        own = {f"{name}.weight": shape for name, shape in dense.items()}
        norms = ["input_layernorm", "post_attention_layernorm"]
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"] * (kind in ("gemma2", "gemma3_text"))
        norms = ["post_attention_layernorm", "post_feedforward_layernorm"] if kind == "olmo2" else norms
        own |= {f"{name}.weight": (D,) for name in norms}
        biased = [name for name in dense if name.startswith("self_attn") and config.get("attention_bias")]
        biased += [name for name in dense if name.startswith("mlp") and config.get("mlp_bias")]
        biased += [name for name in dense if name[-6:] in ("q_proj", "k_proj", "v_proj") and qwen2]
        own |= {f"{name}.bias": dense[name][:1] for name in biased}
        if kind in ("qwen3", "gemma3_text"):
            own |= {"self_attn.q_norm.weight": (H,), "self_attn.k_norm.weight": (H,)}
        if kind == "olmo2":
            own |= {"self_attn.q_norm.weight": (N,), "self_attn.k_norm.weight": (K,)}
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in own.items()}
    return shapes


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
        config = {**(ENCODER if encodes else SHAPE), **OWN[family], **size, **config}
        config |= {"model_type": family, "torch_dtype": dtype, "tie_word_embeddings": tied or encodes}
        draw, tensors = np.random.default_rng(seed), {}
        for name, shape in (encoder_shapes if encodes else hf_shapes)(config).items():
            noise = draw.standard_normal(shape, np.float32)
            scales = "norm" in name.lower() and name.endswith("weight")
            tensors[name] = (1 + 0.3 * noise if scales else 0.2 * noise).astype(DTYPES[dtype])
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config, indent=2))
        for file in TOKENIZER if tokenizer else ():
            if (BASE / file).is_file():
                shutil.copyfile(BASE / file, folder / file)
        return folder

    return make
