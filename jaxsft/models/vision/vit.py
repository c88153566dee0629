"""ViT: the vision transformer that reads an image off at its class token.

Heads other than the classifier (poolers, decoders of masked patches) are carried along, not computed.
Source: Dosovitskiy et al. 2020, arXiv:2010.11929.
"""

from collections.abc import Mapping
from typing import Any

from jax.sharding import PartitionSpec as P

from jaxsft.models import family
from jaxsft.models.family import Family, Name, Reader, Rules, read_classes, read_square
from jaxsft.models.vision.tower import TowerConfig

# Of training, of heads that are not computed here, and of ways to compute the same.
NEUTRAL = (
    "attention_probs_dropout_prob",
    "encoder_stride",
    "hidden_dropout_prob",
    "num_labels",
    "pooler_act",
    "pooler_output_size",
)


def read_tower(read: Reader, **more: Any) -> TowerConfig:
    """Reads what ViT and its relatives have in common; `more` are fields that a family sets otherwise."""
    read.skip(*NEUTRAL)
    given = {
        "width": read("hidden_size", 768),
        "layers": read("num_hidden_layers", 12),
        "heads": read("num_attention_heads", 12),
        "image_size": read_square(read, "image_size", 224),
        "channels": read("num_channels", 3),
        "activation": read("hidden_act", "gelu"),
    }
    if "mlp_hidden" not in more:
        given["mlp_hidden"] = read("intermediate_size", 3072)
    if "patch" not in more:
        given["patch"] = read_square(read, "patch_size", 16)
    if "norm_eps" not in more:
        given["norm_eps"] = read("layer_norm_eps", 1e-12)
    return TowerConfig(**(given | more))


def read_config(config: Mapping[str, Any]) -> TowerConfig:
    read = Reader(config)
    shape = read_tower(read, labels=read_classes(read, FAMILY.classifier), qkv_bias=read("qkv_bias", True))
    read.finish()
    return shape


def names(base: str) -> tuple[Name, ...]:
    """The names of a ViT called `base`."""
    layer = f"{base}.encoder.layer.{{layer}}"
    return (
        Name("embed/cls", f"{base}.embeddings.cls_token"),
        Name("embed/positions", f"{base}.embeddings.position_embeddings"),
        *family.conv("embed/patch", f"{base}.embeddings.patch_embeddings.projection"),
        *family.norm("blocks/attn_norm", f"{layer}.layernorm_before"),
        *family.dense("blocks/attn/q", f"{layer}.attention.attention.query"),
        *family.dense("blocks/attn/k", f"{layer}.attention.attention.key"),
        *family.dense("blocks/attn/v", f"{layer}.attention.attention.value"),
        *family.dense("blocks/attn/o", f"{layer}.attention.output.dense"),
        *family.norm("blocks/mlp_norm", f"{layer}.layernorm_after"),
        *family.dense("blocks/mlp/up", f"{layer}.intermediate.dense"),
        *family.dense("blocks/mlp/down", f"{layer}.output.dense"),
        *family.norm("norm", f"{base}.layernorm"),
        *family.dense("classifier", "classifier"),
    )


# What transformers calls the modules since its version 5; files, and modules before, have the names above.
ATTENTION = (
    (r"\.attention\.attention\.query\b", ".attention.q_proj"),
    (r"\.attention\.attention\.key\b", ".attention.k_proj"),
    (r"\.attention\.attention\.value\b", ".attention.v_proj"),
    (r"\.attention\.output\.dense\b", ".attention.o_proj"),
)
SWIGLU = (r"\.mlp\.weights_out\b", ".mlp.down_proj")
MODULES = (
    (r"\bencoder\.layer\.", "layers."),
    *ATTENTION,
    (r"\.intermediate\.dense\b", ".mlp.fc1"),
    (r"\.output\.dense\b", ".mlp.fc2"),
)

# As the decoders': `tensor` cuts heads, hidden units of the MLP and classes, `fsdp` the rest.
TOWER: Rules = (
    ("embed/patch/filters", P("fsdp", None, None, None)),
    ("embed/(patch/bias|norm/(scale|bias))", P(None)),
    ("blocks/[^/]+/(attn/[qkv]|mlp/up|swiglu/gate_up)/kernel", P(None, "fsdp", "tensor")),
    ("blocks/[^/]+/(attn/o|(mlp|swiglu)/down)/kernel", P(None, "tensor", "fsdp")),
    ("blocks/[^/]+/(attn/[qkv]|mlp/up|swiglu/gate_up)/bias", P(None, "tensor")),
    ("blocks/[^/]+/(attn/o|(mlp|swiglu)/down)/bias", P(None, None)),
    ("blocks/[^/]+/(attn|mlp)_(norm|gain)/(scale|bias)", P(None, None)),
    ("classifier/kernel", P("fsdp", "tensor")),
    ("classifier/bias", P("tensor")),
)
NORM: Rules = (("norm/(scale|bias)", P(None)),)
RULES: Rules = (*TOWER, *NORM, ("embed/(cls|distillation|registers|positions)", P(None, None, "fsdp")))

LOST = (r"(vit\.)?pooler\..*", r"(vit\.)?embeddings\.mask_token", r"decoder\..*")
FAMILY = Family(
    read_config,
    names("vit"),
    RULES,
    prefix="vit.",
    copies=(),
    unused=LOST,
    lost=LOST,
    modules=MODULES,
    task=None,
    classifier="ViTForImageClassification",
    checkpoints=("google/vit-base-patch16-224", "google/vit-base-patch16-224-in21k", "facebook/dino-vits16"),
)
