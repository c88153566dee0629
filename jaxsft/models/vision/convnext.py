"""ConvNeXt: a convolutional network in the manner of a transformer, pooled over the last image.

Source: Liu et al. 2022, arXiv:2201.03545.
"""

from collections.abc import Mapping
from typing import Any

from jax.sharding import PartitionSpec as P

from jaxsft.models import family
from jaxsft.models.family import Family, Name, Reader, Rules, read_classes, read_square
from jaxsft.models.vision.depthwise import ConvNextConfig
from jaxsft.models.vision.resnet import NEUTRAL, STAGES, read_stages


def read_convnext(read: Reader, classifier: str, **more: Any) -> ConvNextConfig:
    """Reads what both versions have."""
    read.skip(*NEUTRAL, "drop_path_rate")
    widths, depths = read_stages(read, [96, 192, 384, 768], [3, 3, 9, 3])
    read.expect("num_stages", len(widths))
    return ConvNextConfig(
        widths=widths,
        depths=depths,
        patch=read("patch_size", 4),
        image_size=read_square(read, "image_size", 224),
        channels=read("num_channels", 3),
        labels=read_classes(read, classifier),
        norm_eps=read("layer_norm_eps", 1e-12),
        activation=read("hidden_act", "gelu"),
        **more,
    )


def read_config(config: Mapping[str, Any]) -> ConvNextConfig:
    read = Reader(config)
    shape = read_convnext(read, FAMILY.classifier, gain=read("layer_scale_init_value", 1e-6) or None)
    read.finish()
    return shape


def _stage(base: str, i: int) -> tuple[Name, ...]:
    stage = f"{base}.encoder.stages.{i}"
    block = f"{stage}.layers.{{layer}}"
    return (
        *family.norm(f"stage{i}/halve/norm", f"{stage}.downsampling_layer.0"),
        *family.conv(f"stage{i}/halve/conv", f"{stage}.downsampling_layer.1"),
        *family.conv(f"stage{i}/conv", f"{block}.dwconv"),
        *family.norm(f"stage{i}/norm", f"{block}.layernorm"),
        *family.dense(f"stage{i}/up", f"{block}.pwconv1"),
        *family.norm(f"stage{i}/response", f"{block}.grn"),
        *family.dense(f"stage{i}/down", f"{block}.pwconv2"),
        Name(f"stage{i}/gain/scale", f"{block}.layer_scale_parameter"),
    )


def names(base: str) -> tuple[Name, ...]:
    """The names of a ConvNeXt called `base`."""
    return (
        *family.conv("embed/conv", f"{base}.embeddings.patch_embeddings"),
        *family.norm("embed/norm", f"{base}.embeddings.layernorm"),
        *sum((_stage(base, i) for i in range(STAGES)), ()),
        *family.norm("norm", f"{base}.layernorm"),
        *family.dense("classifier", "classifier"),
    )


# As a transformer's: `tensor` cuts hidden units and classes, `fsdp` the rest.
RULES: Rules = (
    ("(embed|stage./halve)/conv/filters", P("fsdp", None, None, None)),
    ("(embed|stage./halve)/(conv/bias|norm/(scale|bias))|norm/(scale|bias)", P(None)),
    ("stage./[^/]+/conv/filters", P(None, "fsdp", None, None, None)),
    ("stage./[^/]+/up/kernel", P(None, "fsdp", "tensor")),
    ("stage./[^/]+/down/kernel", P(None, "tensor", "fsdp")),
    ("stage./[^/]+/up/bias", P(None, "tensor")),
    ("stage./[^/]+/(conv/bias|down/bias|norm/(scale|bias)|gain/scale)", P(None, None)),
    ("classifier/kernel", P("fsdp", "tensor")),
    ("classifier/bias", P("tensor")),
)

FAMILY = Family(
    read_config,
    names("convnext"),
    RULES,
    prefix="convnext.",
    copies=(),
    task=None,
    classifier="ConvNextForImageClassification",
    checkpoints=("facebook/convnext-tiny-224", "facebook/convnext-base-224-22k"),
)
