"""One tiny random model of images twice: in torch, by transformers' own classes, and here, of what torch saved."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from jaxsft import hub, models
from jaxsft.models import Family, Model
from jaxsft.tree import Tree

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

torch.set_num_threads(1)  # the models are tiny and the cores few

NAMES = ["crack", "daisy", "ä rose"]
WORDS = {"id2label": dict(enumerate(NAMES)), "label2id": {name: i for i, name in enumerate(NAMES)}}
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
DINO = {key: value for key, value in TOWER.items() if key != "intermediate_size"}
DINO |= {"image_size": 28, "patch_size": 7, "mlp_ratio": 2}
TEXT = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 30}
BOTH = {"vision_config": TOWER, "text_config": {**TEXT, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}}
STAGES = {"hidden_sizes": [8, 16], "depths": [2, 3], "num_stages": 2}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 3]}

# name: (class of transformers, class of its config, what the config has)
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "vit": ("ViTForImageClassification", "ViTConfig", {**TOWER, **WORDS}),
    "vit-no-bias": ("ViTForImageClassification", "ViTConfig", {**TOWER, "qkv_bias": False, "hidden_act": "gelu_new"}),
    "vit-base": ("ViTModel", "ViTConfig", TOWER),
    "deit": ("DeiTForImageClassification", "DeiTConfig", {**TOWER, **WORDS}),
    "deit-teacher": ("DeiTForImageClassificationWithTeacher", "DeiTConfig", TOWER),
    "dinov2": ("Dinov2ForImageClassification", "Dinov2Config", {**DINO, **WORDS}),
    "dinov2-gated": ("Dinov2ForImageClassification", "Dinov2Config", {**DINO, "use_swiglu_ffn": True}),
    "dinov2-base": ("Dinov2Model", "Dinov2Config", DINO),
    "registers": (
        "Dinov2WithRegistersForImageClassification",
        "Dinov2WithRegistersConfig",
        {**DINO, "num_register_tokens": 3},
    ),
    "clip": ("CLIPForImageClassification", "CLIPConfig", {**BOTH, **WORDS}),
    "clip-both": ("CLIPModel", "CLIPConfig", {**BOTH, "projection_dim": 8}),
    "clip-tower": ("CLIPVisionModel", "CLIPVisionConfig", TOWER),
    "clip-projected": ("CLIPVisionModelWithProjection", "CLIPVisionConfig", {**TOWER, "projection_dim": 8}),
    "siglip": ("SiglipForImageClassification", "SiglipConfig", {**BOTH, **WORDS}),
    "siglip-both": ("SiglipModel", "SiglipConfig", BOTH),
    "siglip-tower": ("SiglipVisionModel", "SiglipVisionConfig", TOWER),
    "resnet": ("ResNetForImageClassification", "ResNetConfig", {**RESNET, **WORDS}),
    "resnet-basic": (
        "ResNetForImageClassification",
        "ResNetConfig",
        {**RESNET, "layer_type": "basic", "downsample_in_first_stage": True},
    ),
    "resnet-first": ("ResNetForImageClassification", "ResNetConfig", {**RESNET, "downsample_in_bottleneck": True}),
    "resnet-base": ("ResNetModel", "ResNetConfig", RESNET),
    "convnext": ("ConvNextForImageClassification", "ConvNextConfig", {**STAGES, **WORDS}),
    "convnext-base": ("ConvNextModel", "ConvNextConfig", {**STAGES, "layer_scale_init_value": 0.0}),
    "convnextv2": ("ConvNextV2ForImageClassification", "ConvNextV2Config", {**STAGES, **WORDS}),
}
HEADED = [case for case, (kind, _, _) in CASES.items() if kind.endswith("ForImageClassification")]
BARE = [case for case in CASES if case not in HEADED]


class Pair(NamedTuple):
    name: str
    folder: Path  # what torch saved
    theirs: Any
    model: Model
    params: Tree
    family: Family


def randomise(model) -> None:
    """Weights that tell every part of a network from every other."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in [*model.named_parameters(), *model.named_buffers()]:
            if weight.is_floating_point():
                noise = torch.randn(weight.shape, generator=draw)
                scales = "norm" in name and name.endswith("weight")
                weight.copy_(0.5 + noise.abs() if name.endswith("running_var") else 0.15 * noise + scales)


def make(case: str, folder: Path) -> Pair:
    kind, config, keys = CASES[case]
    theirs = getattr(transformers, kind)(getattr(transformers, config)(**keys)).eval()
    randomise(theirs)
    theirs.save_pretrained(folder)
    model, params = hub.load(str(folder))
    return Pair(case, folder, theirs, model, params, hub.read_config(folder)[0])


def pixels(height: int, width: int, count: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, height, width, 3)).astype(np.float32)


def ours(model: Model, variables, images) -> np.ndarray:
    """Class scores [B, K]."""
    run = jax.jit(lambda variables, images: models.logits(model, variables, model.features(variables, images)))
    return np.asarray(run(variables, images))[:, 0]


def hidden(model: Model, variables, images) -> np.ndarray:
    """The last hidden states [B, T, D]."""
    bare = models.build(dataclasses.replace(model.config, pooling="none", labels=0))  # type: ignore[type-var]
    return np.asarray(jax.jit(bare.features)(variables, images))


def asked(model, images):
    """A torch model's outcome, interpolating where it has to be told."""
    name = type(model).__name__
    by_itself = ("ResNet", "ConvNext", "Dinov2")
    more = {} if name.startswith(by_itself) else {"interpolate_pos_encoding": True}
    with torch.no_grad():
        return model(torch.tensor(images.transpose(0, 3, 1, 2)), **more)


def theirs(model, images) -> np.ndarray:
    return asked(model, images).logits.numpy()


def their_hidden(model, images) -> np.ndarray:
    own = getattr(model, "vision_model", None) or getattr(model, model.base_model_prefix, model)
    states = asked(own, images).last_hidden_state.numpy()
    return states.transpose(0, 2, 3, 1).reshape(len(states), -1, states.shape[1]) if states.ndim == 4 else states
