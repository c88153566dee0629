"""ResNet, with blocks of two layers (18, 34) or bottlenecks (50, 101, 152), pooled over the last image.

Source: He et al. 2015, arXiv:1512.03385.
"""

from collections.abc import Mapping
from typing import Any

from jax.sharding import PartitionSpec as P

from jaxsft.models import family
from jaxsft.models.family import Family, Name, Reader, Rules, read_classes
from jaxsft.models.vision.residual import ResNetConfig

STAGES = 4  # at most
NEUTRAL = ("num_labels", "out_features", "out_indices", "stage_names")  # of use as another network's backbone


def read_stages(read: Reader, widths: list[int], depths: list[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Reads widths and depths of the stages.

    Raises:
      ValueError: more stages than there are names for.
    """
    found = tuple(read("hidden_sizes", widths)), tuple(read("depths", depths))
    if len(found[0]) > STAGES:
        raise ValueError(f"config.json has {len(found[0])} stages; up to {STAGES} are supported")
    return found


def read_config(config: Mapping[str, Any]) -> ResNetConfig:
    read = Reader(config)
    read.skip(*NEUTRAL)
    read.expect("layer_type", "bottleneck", "basic")
    widths, depths = read_stages(read, [256, 512, 1024, 2048], [3, 4, 6, 3])
    shape = ResNetConfig(
        embedding=read("embedding_size", 64),
        widths=widths,
        depths=depths,
        bottleneck=read("layer_type", "bottleneck") == "bottleneck",
        stride_first=read("downsample_in_bottleneck", False),
        halve_first=read("downsample_in_first_stage", False),
        channels=read("num_channels", 3),
        labels=read_classes(read, FAMILY.classifier),
        activation=read("hidden_act", "relu"),
    )
    read.finish()
    return shape


def unit(here: str, there: str) -> tuple[Name, ...]:
    """The names of a convolution and its norm."""
    norm = f"{there}.normalization"
    return (
        Name(f"{here}/conv/filters", f"{there}.convolution.weight"),
        *family.norm(f"{here}/norm", norm),
        Name(f"{here}/norm/running_mean", f"{norm}.running_mean"),
        Name(f"{here}/norm/running_var", f"{norm}.running_var"),
    )


def _stage(i: int) -> tuple[Name, ...]:
    block = f"resnet.encoder.stages.{i}.layers.{{layer}}"
    layers = [unit(f"stage{i}/layer{j}", f"{block}.layer.{j}") for j in range(3)]
    return sum([*layers, unit(f"stage{i}/shortcut", f"{block}.shortcut")], ())


# Convolutions are cut by what they give, over fsdp alone; of a network this small `tensor` would save nothing.
RULES: Rules = (
    ("embed/conv/filters", P("fsdp", None, None, None)),
    ("embed/norm/(scale|bias|running_(mean|var))", P(None)),
    ("stage./[^/]+/(layer.|shortcut)/conv/filters", P(None, "fsdp", None, None, None)),
    ("stage./[^/]+/(layer.|shortcut)/norm/(scale|bias|running_(mean|var))", P(None, None)),
    ("classifier/kernel", P("fsdp", "tensor")),
    ("classifier/bias", P("tensor")),
)

FAMILY = Family(
    read_config,
    (
        *unit("embed", "resnet.embedder.embedder"),
        *sum(map(_stage, range(STAGES)), ()),
        *family.dense("classifier", "classifier.1"),
    ),
    RULES,
    prefix="resnet.",
    copies=(),
    unused=(r".*\.num_batches_tracked",),
    task=None,
    classifier="ResNetForImageClassification",
    checkpoints=("microsoft/resnet-18", "microsoft/resnet-50"),
)
