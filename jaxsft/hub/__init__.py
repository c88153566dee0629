"""Hugging Face checkpoints, tokenizers and PEFT adapters, in and out."""

from dataclasses import dataclass, field
from typing import Literal

from jaxsft.hub.disk import on_disk
from jaxsft.hub.files import CheckpointError, digest, resolve
from jaxsft.hub.images import classes
from jaxsft.hub.merge import export, merge
from jaxsft.hub.peft import export_adapter, load_adapter
from jaxsft.hub.source import read_config, shapes
from jaxsft.hub.tokenizer import adapter_template, adapter_tokenizer, load_tokenizer, save_template, stop_tokens
from jaxsft.hub.vocabulary import Vocabulary, load_vocabulary, save_tokens
from jaxsft.hub.weights import abstract, init, load, load_variables


@dataclass(frozen=True)
class Config:
    """The model to start from."""

    path: str = ""
    """a folder with config.json and safetensors (or an old flax_model.msgpack), or a hub name such as org/name"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """of the computation and of frozen weights; what trains is float32, and so are softmax and loss"""
    remat: Literal["none", "dots", "block", "offload"] = "dots"
    """what the backward pass computes again to save memory: nothing; all but matrix products and attention, which costs
    no time; whole layers, from their inputs; or these from inputs that wait in the host's memory"""
    attention: Literal["auto", "blocks", "plain", "splash", "mha"] = "auto"
    """the kernel that computes it: the backend's best that can do what the model needs (auto), blocks anywhere, splash
    on TPUs, mha on NVIDIA GPUs, or plain, with every score in memory; see docs/attention.md"""
    quantise: Literal["none", "int8", "nf4"] = "none"
    """keep the kernels of the layers packed in memory: int8, or QLoRA's nf4 with 4.13 bits a weight. They cannot train
    then; LoRA does, beside them, and is merged into the base as its files have it"""
    new_tokens: list[str] = field(default_factory=list)
    """text that becomes one token each, wherever it stands; embedding and output layer get rows for them, begun at the
    mean of the others, and train whatever tuning says"""
    new_special_tokens: list[str] = field(default_factory=list)
    """likewise, for what a chat template writes; in the words of a message these are spelled, unless
    data.control_tokens"""
    vocab_multiple: int = 1
    """where new tokens need more rows than there are, their number becomes a multiple of this; 64 suits any
    mesh.tensor, which has to divide the rows to cut them"""


@dataclass(frozen=True)
class ExportConfig:
    """What a run leaves for other programs."""

    adapter: bool = True
    """write <output_dir>/adapter in PEFT's format, after LoRA"""
    merged: bool = True
    """write <output_dir>/merged, a whole Hugging Face checkpoint"""
    shard_gb: float = 5.0
    """the largest weight file, in 10^9 bytes"""


__all__ = [
    "CheckpointError",
    "Config",
    "ExportConfig",
    "Vocabulary",
    "abstract",
    "adapter_template",
    "adapter_tokenizer",
    "classes",
    "digest",
    "export",
    "export_adapter",
    "init",
    "load",
    "load_adapter",
    "load_tokenizer",
    "load_variables",
    "load_vocabulary",
    "merge",
    "on_disk",
    "read_config",
    "resolve",
    "save_template",
    "save_tokens",
    "shapes",
    "stop_tokens",
]
