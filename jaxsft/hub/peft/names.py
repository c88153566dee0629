"""What PEFT calls the files of an adapter, its tensors and its keys."""

import re

import numpy as np

from jaxsft.hub.names import Address

FILE, PICKLE, CONFIG = "adapter_model.safetensors", "adapter_model.bin", "adapter_config.json"
PREFIX = "base_model.model."
LINEAR = {"a": "lora_A.weight", "b": "lora_B.weight", "m": "lora_magnitude_vector"}
EMBEDDING = {"a": "lora_embedding_A", "b": "lora_embedding_B", "m": "lora_magnitude_vector"}
PARTS = {name: part for kind in (LINEAR, EMBEDDING) for part, name in kind.items()}
TOKENS = "trainable_tokens_delta"  # the rows of some tokens, whole in spite of its name
# <module>.<what it is>
NAME = re.compile(rf"(.+?)\.({'|'.join(map(re.escape, PARTS))}|{TOKENS}|(?:base_layer\.)?(?:weight|bias))")
# Where tables have grown PEFT writes a saved module twice more, as it is within a wrapper, and the base's along.
WRAPPED = re.compile(r"(.+)\.(?:modules_to_save|original_module)\.(weight|bias)")
EMBED, HEAD = Address("embed/table", None), Address("head/table", None)
SCORES = "SEQ_CLS"  # the task of a reward model, whose score PEFT saves whole
FULL = np.dtype("float32")
