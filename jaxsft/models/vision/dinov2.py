"""DINOv2: ViT with gains, classified by its class token and the mean of its patches together.

Source: Oquab et al. 2023, arXiv:2304.07193.
"""

from collections.abc import Mapping
from typing import Any

from jaxsft.models import family
from jaxsft.models.family import Family, Name, Reader, read_classes, read_square
from jaxsft.models.vision.tower import TowerConfig
from jaxsft.models.vision.vit import ATTENTION, RULES, SWIGLU, read_tower

# Of use as another network's backbone, and of training.
NEUTRAL = (
    "apply_layernorm",
    "drop_path_rate",
    "out_features",
    "out_indices",
    "reshape_hidden_states",
    "stage_names",
    "use_mask_token",
)


def read_dino(read: Reader, classifier: str, **more: Any) -> TowerConfig:
    """Reads what both generations have."""
    read.skip(*NEUTRAL)
    mlp, gated = int(read("hidden_size", 768) * read("mlp_ratio", 4)), read("use_swiglu_ffn", False)
    return read_tower(
        read,
        labels=read_classes(read, classifier),
        pooling="cls+mean",
        patch=read_square(read, "patch_size", 14),
        mlp_hidden=(int(mlp * 2 / 3) + 7) // 8 * 8 if gated else mlp,
        gated=gated,
        gain=read("layerscale_value", 1.0),
        qkv_bias=read("qkv_bias", True),
        norm_eps=read("layer_norm_eps", 1e-6),
        **more,
    )


def read_config(config: Mapping[str, Any]) -> TowerConfig:
    read = Reader(config)
    shape = read_dino(read, FAMILY.classifier)
    read.finish()
    return shape


def names(base: str) -> tuple[Name, ...]:
    """The names of a DINOv2 called `base`."""
    layer = f"{base}.encoder.layer.{{layer}}"
    return (
        Name("embed/cls", f"{base}.embeddings.cls_token"),
        Name("embed/positions", f"{base}.embeddings.position_embeddings"),
        *family.conv("embed/patch", f"{base}.embeddings.patch_embeddings.projection"),
        *family.norm("blocks/attn_norm", f"{layer}.norm1"),
        *family.dense("blocks/attn/q", f"{layer}.attention.attention.query"),
        *family.dense("blocks/attn/k", f"{layer}.attention.attention.key"),
        *family.dense("blocks/attn/v", f"{layer}.attention.attention.value"),
        *family.dense("blocks/attn/o", f"{layer}.attention.output.dense"),
        Name("blocks/attn_gain/scale", f"{layer}.layer_scale1.lambda1"),
        *family.norm("blocks/mlp_norm", f"{layer}.norm2"),
        *family.dense("blocks/mlp/up", f"{layer}.mlp.fc1"),
        *family.dense("blocks/mlp/down", f"{layer}.mlp.fc2"),
        *family.dense("blocks/swiglu/gate_up", f"{layer}.mlp.weights_in"),
        *family.dense("blocks/swiglu/down", f"{layer}.mlp.weights_out"),
        Name("blocks/mlp_gain/scale", f"{layer}.layer_scale2.lambda1"),
        *family.norm("norm", f"{base}.layernorm"),
        *family.dense("classifier", "classifier"),
    )


FAMILY = Family(
    read_config,
    names("dinov2"),
    RULES,
    prefix="dinov2.",
    copies=(),
    unused=(r"(dinov2\.)?embeddings\.mask_token",),
    modules=(*ATTENTION, SWIGLU),
    task=None,
    classifier="Dinov2ForImageClassification",
    checkpoints=("facebook/dinov2-small", "facebook/dinov2-base", "facebook/dinov2-small-imagenet1k-1-layer"),
)
