"""One tiny random model twice: in torch, by transformers' own classes, and here, by `hub.load` of what torch saved."""

import copy
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsft import hub, models
from jaxsft.models import Family, Model
from jaxsft.tree import Tree

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

torch.set_num_threads(1)  # the models are tiny and the cores few

# Of random weights. Logits then have a deviation of about 1, and attention is neither flat nor a choice of one key. At
# 0.2 the network amplifies the last bit of transformers' float32 rope frequencies (ours are rounded from float64) to
# 1.2e-4 after 160 tokens in the worst case; with its frequencies in our decoder a fifth of that was left.
SIZE = 0.15
VOCAB = 96
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    **dict.fromkeys(IDS),
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,  # small, so that slow, blended and fast waves all occur
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 16.0,
}
CAPS = {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 2.0}  # small, so that they bend
NO_CAPS = {"attn_logit_softcapping": None, "final_logit_softcapping": None}
LOCAL = ["sliding_attention", "full_attention", "sliding_attention"]
GLOBAL = {
    "full_attention": {"rope_type": "linear", "factor": 3.0, "rope_theta": 40_000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
}
GRANITE = {
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.2,
    "residual_multiplier": 0.6,
    "logits_scaling": 0.7,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 3.0}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
    "long_factor": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
}
MOE = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 40}
GPT2 = {"vocab_size": VOCAB, "n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 512, **dict.fromkeys(IDS)}
LINEAR = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 3.0}
MIXED = {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1, "num_hidden_layers": 4}

# name: (config class of transformers, what differs from SHAPE)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-mha-untied": ("LlamaConfig", {"num_key_value_heads": 4}),
    "llama-gqa-tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "llama-biases": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "llama-rope-linear": ("LlamaConfig", {"rope_parameters": LINEAR}),
    "llama-rope-llama3": ("LlamaConfig", {"rope_parameters": LLAMA3}),
    "llama-wide-heads": ("LlamaConfig", {"head_dim": 20}),
    "mistral-no-window": ("MistralConfig", {"sliding_window": None}),
    "mistral-window": ("MistralConfig", {"sliding_window": 11}),
    "mistral-tied-wide-heads": ("MistralConfig", {"sliding_window": 5, "head_dim": 20, "tie_word_embeddings": True}),
    "qwen2-untied": ("Qwen2Config", {}),
    "qwen2-tied": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen2-mixed-windows": ("Qwen2Config", MIXED),
    "qwen3-untied": ("Qwen3Config", {"head_dim": 16}),
    "qwen3-tied": ("Qwen3Config", {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3-biases": ("Qwen3Config", {"head_dim": 16, "attention_bias": True}),
    "qwen3-mixed-windows": ("Qwen3Config", {"head_dim": 16, **MIXED}),
    "llama-rope-yarn": ("LlamaConfig", {"rope_parameters": YARN}),
    "gemma-tied": ("GemmaConfig", {"head_dim": 16}),
    "gemma-untied-biases": ("GemmaConfig", {"head_dim": 12, "tie_word_embeddings": False, "attention_bias": True}),
    "gemma-mqa": ("GemmaConfig", {"head_dim": 16, "num_key_value_heads": 1}),
    "gemma2-windows": ("Gemma2Config", {"head_dim": 16, "sliding_window": 11, "num_hidden_layers": 4, **CAPS}),
    "gemma2-no-caps": ("Gemma2Config", {"head_dim": 16, **NO_CAPS}),
    "gemma2-untied": ("Gemma2Config", {"head_dim": 16, "tie_word_embeddings": False, "query_pre_attn_scalar": 24}),
    "gemma3-two-ropes": ("Gemma3TextConfig", {"head_dim": 16, "sliding_window": 9, "num_hidden_layers": 7}),
    "gemma3-rope-linear": ("Gemma3TextConfig", {"head_dim": 16, "rope_parameters": GLOBAL, "layer_types": LOCAL}),
    "gemma3-logit-cap": (
        "Gemma3TextConfig",
        {"head_dim": 16, "query_pre_attn_scalar": 24, "final_logit_softcapping": 2.0},
    ),
    "olmo2-untied": ("Olmo2Config", {}),
    "olmo2-tied-biases": ("Olmo2Config", {"tie_word_embeddings": True, "attention_bias": True}),
    "olmo2-mha": ("Olmo2Config", {"num_key_value_heads": 4}),
    "granite-multipliers": ("GraniteConfig", GRANITE),
    "granite-tied-biases": (
        "GraniteConfig",
        {**GRANITE, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    ),
    "granite-plain": ("GraniteConfig", {"attention_multiplier": 0.25}),
    "smollm3-tied": ("SmolLM3Config", {"num_hidden_layers": 4}),
    "smollm3-windows": (
        "SmolLM3Config",
        {"num_hidden_layers": 4, "use_sliding_window": True, "sliding_window": 9, "no_rope_layer_interval": 2},
    ),
    "smollm3-untied-biases": (
        "SmolLM3Config",
        {"no_rope_layers": [0, 1, 1], "tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True},
    ),
    "llama-rope-dynamic": ("LlamaConfig", {"rope_parameters": DYNAMIC, "max_position_embeddings": 64}),
    "phi3-untied": ("Phi3Config", {}),
    "phi3-window-tied": ("Phi3Config", {"sliding_window": 11, "tie_word_embeddings": True}),
    "phi3-longrope": ("Phi3Config", {"rope_parameters": LONG, "original_max_position_embeddings": 64}),
    "phi3-partial": ("Phi3Config", {"rope_parameters": {"rope_theta": 10_000.0, "partial_rotary_factor": 0.67}}),
    "gpt2-tied": ("GPT2Config", {}),
    "gpt2-untied-inner": ("GPT2Config", {"n_inner": 100, "tie_word_embeddings": False}),
    "gpt2-unscaled": ("GPT2Config", {"scale_attn_weights": False, "activation_function": "gelu"}),
    "mixtral-untied": ("MixtralConfig", {"num_local_experts": 4}),
    "mixtral-window": ("MixtralConfig", {"num_local_experts": 6, "num_experts_per_tok": 3, "sliding_window": 11}),
    "mixtral-tied-one": (
        "MixtralConfig",
        {"num_local_experts": 4, "num_experts_per_tok": 1, "tie_word_embeddings": True},
    ),
    "qwen2-moe": ("Qwen2MoeConfig", {**MOE, "shared_expert_intermediate_size": 56}),
    "qwen2-moe-some-dense": (
        "Qwen2MoeConfig",
        {**MOE, "shared_expert_intermediate_size": 56, "mlp_only_layers": [0], "norm_topk_prob": True},
    ),
    "qwen2-moe-windows-no-bias": (
        "Qwen2MoeConfig",
        {**MOE, "shared_expert_intermediate_size": 56, "qkv_bias": False, **MIXED, "max_window_layers": 3},
    ),
    "qwen3-moe": ("Qwen3MoeConfig", {**MOE, "norm_topk_prob": True, "head_dim": 16}),
    "qwen3-moe-every-second": ("Qwen3MoeConfig", {**MOE, "decoder_sparse_step": 2, "num_hidden_layers": 4}),
    "qwen3-moe-tied-biases": ("Qwen3MoeConfig", {**MOE, "tie_word_embeddings": True, "attention_bias": True}),
    "gpt-oss": ("GptOssConfig", {"num_local_experts": 4, "head_dim": 16, "sliding_window": 11}),
    "gpt-oss-one-expert-tied": (
        "GptOssConfig",
        {"num_local_experts": 4, "num_experts_per_tok": 1, "head_dim": 16, "tie_word_embeddings": True},
    ),
    "gpt-oss-no-bias": (
        "GptOssConfig",
        {"num_local_experts": 6, "head_dim": 16, "attention_bias": False, "swiglu_limit": 0.5, "layer_types": LOCAL},
    ),
}


# Where frequencies follow the length. transformers takes the longest row of a batch, and "dynamic" remembers earlier
# ones; we take each document's own: only a document alone, in a model that has read nothing, can be compared. The
# numbers are prompt lengths whose continuation of 64 tokens keeps its frequencies: where they change, what is cached
# was made by the old ones, here and there, in different ways.
BY_LENGTH = {"llama-rope-dynamic": [1], "phi3-longrope": [1, 70]}
ENCODER = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 258,
}
# name: (class of transformers, what differs from ENCODER)
ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert-masked": ("BertForMaskedLM", {}),
    "bert-masked-gelu-new": ("BertForMaskedLM", {"hidden_act": "gelu_new", "layer_norm_eps": 1e-5}),
    "bert-masked-relu-one-type": (
        "BertForMaskedLM",
        {"hidden_act": "relu", "type_vocab_size": 1, "num_hidden_layers": 5},
    ),
    "bert-pretraining": ("BertForPreTraining", {"num_attention_heads": 6}),
    "bert-base": ("BertModel", {}),
    "bert-base-wide": ("BertModel", {"intermediate_size": 192, "hidden_size": 32, "tie_word_embeddings": False}),
    "roberta-masked": ("RobertaForMaskedLM", {}),
    "roberta-masked-relu": ("RobertaForMaskedLM", {"hidden_act": "relu", "type_vocab_size": 1, "layer_norm_eps": 1e-5}),
    "roberta-masked-other-padding": ("RobertaForMaskedLM", {"pad_token_id": 3, "num_attention_heads": 6}),
    "roberta-base": ("RobertaModel", {"hidden_act": "gelu_new"}),
}


class Pair(NamedTuple):
    """The same weights on both sides."""

    name: str
    folder: Path  # what save_pretrained wrote
    theirs: Any  # the torch model; never written to, see `fresh`
    model: Model
    params: Tree
    family: Family

    def fresh(self) -> Any:
        """A torch model of one's own, for PEFT and training, which change it in place."""
        return copy.deepcopy(self.theirs)


def make(name: str, folder: Path) -> Pair:
    """Makes a random torch model, saves it, and loads it here."""
    if name in ENCODERS:
        return make_encoder(name, folder)
    kind, options = CASES[name]
    config = getattr(transformers, kind)(**{**(GPT2 if kind == "GPT2Config" else SHAPE), **options})
    theirs = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    center = 0 if kind.startswith("Gemma") else 1  # what a norm's weight is at scale 1
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    with torch.no_grad():
        for path, weight in theirs.named_parameters():  # also the biases and norms, which would start at 0 and 1
            noise = torch.randn(weight.shape, generator=generator)
            scales = "norm" in path or (".ln_" in path and "bias" not in path)
            weight.copy_(center + 0.3 * noise if scales else SIZE * noise)
    theirs.save_pretrained(folder)
    model, params = hub.load(str(folder))
    return Pair(name, folder, theirs, model, params, models.FAMILIES[config.model_type])


def make_encoder(name: str, folder: Path) -> Pair:
    """The same of an encoder."""
    kind, options = ENCODERS[name]
    cls = getattr(transformers, kind)
    theirs = cls(cls.config_class(**{**ENCODER, **options}, attn_implementation="eager")).eval()
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    with torch.no_grad():
        for path, weight in theirs.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            scale = "norm" in path.lower() and path.endswith("weight")
            weight.copy_(1 + 0.3 * noise if scale else SIZE * noise)
    theirs.save_pretrained(folder)
    model, params = hub.load(str(folder))
    return Pair(name, folder, theirs, model, params, models.FAMILIES[theirs.config.model_type])


def documents(lengths: Sequence[int], seed: int = 0) -> list[np.ndarray]:
    """Random documents of the given lengths."""
    draw = np.random.default_rng(seed)
    return [draw.integers(0, VOCAB, n, dtype=np.int32) for n in lengths]


class Packed(NamedTuple):
    """Rows of documents, each [B, T], and where each document lies."""

    tokens: np.ndarray
    positions: np.ndarray
    segments: np.ndarray
    places: list[tuple[int, slice]]  # row and columns of each document, in order


def pack(rows: Sequence[Sequence[np.ndarray]], width: int) -> Packed:
    """Lays documents into rows one after the other; the rest of a row is padding, segment 0."""
    tokens, positions, segments = (np.zeros((len(rows), width), np.int32) for _ in range(3))
    places = []
    for i, row in enumerate(rows):
        start = 0
        for number, document in enumerate(row, 1):
            here = slice(start, start + len(document))
            tokens[i, here], positions[i, here], segments[i, here] = document, np.arange(len(document)), number
            places.append((i, here))
            start = here.stop
    return Packed(tokens, positions, segments, places)


@functools.partial(jax.jit, static_argnums=0)
def ours(model: Model, variables, tokens, positions=None, segments=None):
    """Logits [B, T, V] of our model, float32."""
    return models.logits(model, variables, model.features(variables, tokens, positions, segments))


def theirs(model: Any, tokens: np.ndarray, attention_mask: np.ndarray | None = None) -> np.ndarray:
    """Logits [B, T, V] of a torch model, float32."""
    mask = None if attention_mask is None else torch.tensor(attention_mask)
    with torch.no_grad():
        out = model(input_ids=torch.tensor(tokens, dtype=torch.long), attention_mask=mask, use_cache=False)
    return out.logits.float().numpy()


def load_torch(folder: Path | str, dtype: str = "auto") -> Any:
    """Reads a checkpoint with transformers and insists that it is complete.

    In bfloat16 too its rope frequencies stay float32; those of `model.to(torch.bfloat16)` would not.

    Raises:
      AssertionError: keys are missing, left over or of another shape.
    """
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        str(folder), output_loading_info=True, attn_implementation="eager", dtype=dtype
    )
    assert not any(info.values()), info
    return model.eval()


def alone(pair: Pair, document: np.ndarray) -> np.ndarray:
    """Logits [T, V] of one document in torch, float32."""
    return theirs(load_torch(pair.folder) if pair.name in BY_LENGTH else pair.theirs, document[None])[0]


def random_adapter(key: jax.Array, adapter: Tree, size: float) -> Tree:
    """Gives A and B random values; a fresh B is zero and would hide everything."""
    leaves, shape = jax.tree.flatten(adapter)
    keys = jax.random.split(key, len(leaves))
    drawn = [
        x if x.ndim < 3 else size * jax.random.normal(k, x.shape, jnp.float32)
        for k, x in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(shape, drawn)
