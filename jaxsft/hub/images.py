"""A model of images as the classifier that other programs load: its classes, its config.json, its tensors' names.

what the base is                                 what is written, once it has a classifier
ViTModel, Dinov2Model: `encoder.layer.0...`      ViTForImageClassification: `vit.encoder.layer.0...`, no pooler
CLIPVisionModel, config of the tower alone       CLIPForImageClassification, `vision_config` in the config of both
CLIPModel, SiglipModel                           the same, without the tensors of texts
"""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxsft import tree
from jaxsft.hub.files import CheckpointError, read_json, resolve
from jaxsft.models import HEADS, Family, ModelConfig, VisionConfig


def classes(path: str) -> list[str]:
    """The names of the classes that a checkpoint knows, by their numbers; [] where it has no classifier.

    Raises:
      CheckpointError: a class without a name.
    """
    folder = resolve(path)
    raw = read_json(folder / "config.json")
    if not any(name.endswith("ForImageClassification") for name in raw.get("architectures") or ()):
        return []
    named = {int(number): str(name) for number, name in (raw.get("id2label") or {}).items()}
    if sorted(named) != list(range(len(named))):
        raise CheckpointError(f"{folder / 'config.json'} has id2label for {sorted(named)}; 0, 1, 2, ... were expected")
    return [named[number] for number in sorted(named)] or unnamed(raw.get("num_labels", 2))


def unnamed(labels: int) -> list[str]:
    """What transformers calls classes that have no name."""
    return [f"LABEL_{number}" for number in range(labels)]


def classifies(config: ModelConfig) -> bool:
    """Whether this is a classifier of images."""
    return isinstance(config, VisionConfig) and config.labels > 0


def labels_of(params: Mapping) -> int | None:
    """How many labels the output layer among some parameters has, a score 1; None where there is none."""
    if "score" in params:
        return 1
    found = [leaf.shape[-1] for path, leaf in tree.flat(params).items() if path.startswith("classifier/")]
    return int(found[0]) if found else None


def written(family: Family, name: str) -> str | None:
    """What the classifier's file calls a tensor of the base's; None where it has no place for it.

    Example:
      >>> from jaxsft.models import VISION
      >>> family = VISION["vit"]
      >>> written(family, "layernorm.bias"), written(family, "classifier.bias"), written(family, "pooler.dense.bias")
      ('vit.layernorm.bias', 'classifier.bias', None)
    """
    if tree.matches(family.lost, name):
        return None
    heads = {entry.hf for entry in family.names if tree.matches(HEADS, entry.path)}
    return name if name in heads or name.startswith(family.prefix) else family.prefix + name


def said(family: Family, raw: Mapping[str, Any], labels: int, named: Sequence[str] | None) -> dict[str, Any]:
    """The config.json of the classifier.

    Args:
      family: of the base.
      raw: the base's config.json.
      labels: how many classes there are.
      named: their names; by default those that the base has for as many, else LABEL_0, ...

    Raises:
      CheckpointError: another number of names, or a name twice.
    """
    known = family.classifier in (raw.get("architectures") or ())
    if named is None and known and len(raw.get("id2label") or ()) == labels:
        return dict(raw)
    named = unnamed(labels) if named is None else list(map(str, named))
    if len(named) != labels or len(set(named)) != labels:
        raise CheckpointError(f"{labels} classes need as many names, each another; given are {len(named)}: {named[:5]}")
    config = dict(raw)
    if family.parent and raw.get("model_type") != family.parent:
        kept = ("dtype", "torch_dtype", "transformers_version")
        inner = {key: value for key, value in raw.items() if key not in (*kept, "architectures")}
        config = {key: raw[key] for key in kept if key in raw}
        config |= {"model_type": family.parent, "vision_config": inner}
    config |= {"num_labels": labels} if "num_labels" in config else {}
    return config | {
        "architectures": [family.classifier],
        "id2label": {str(number): name for number, name in enumerate(named)},
        "label2id": {name: number for number, name in enumerate(named)},
        "problem_type": "single_label_classification",
    }
