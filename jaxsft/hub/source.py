"""A checkpoint folder as a model: what its config.json describes, and where its weights are."""

import dataclasses
from collections.abc import Collection
from pathlib import Path

import jax

from jaxsft.hub import msgpack, names
from jaxsft.hub.files import CheckpointError, Reader, has_safetensors, read_json
from jaxsft.models import EncoderConfig, Family, ModelConfig, VisionConfig, build, family_of, split, with_labels
from jaxsft.tree import Tree
from jaxsft.types import Key

Weights = Reader | msgpack.Reader


def read_config(folder: Path, labels: int | None = None) -> tuple[Family, ModelConfig]:
    """Reads a folder's `config.json` through its family.

    An encoder whose files hold nothing of a head has none, whatever its architecture is called: sentence encoders often
    keep the config of the model that they came from.

    Args:
      folder: of the checkpoint.
      labels: 1 for the reward model that the checkpoint is or is to become, see `models.with_labels`; by default what
        it is.

    Raises:
      CheckpointError: it is missing, of an unknown family, has keys the family does not know, or cannot be a reward
        model.
    """
    raw = read_json(folder / "config.json")
    try:
        family = family_of(raw)
        config = family.read_config(raw)
    except ValueError as error:
        raise CheckpointError(f"{folder / 'config.json'}: {error}") from error
    try:
        config = with_labels(family, config, labels)
    except ValueError as error:
        raise CheckpointError(f"{folder} is a {raw['model_type']!r} model: {error}") from error
    if isinstance(config, EncoderConfig) and config.mlm and has_weights(folder):
        files = open_weights(folder).files
        head = [names.stored(family, name.hf, files) for name in family.names if name.path.startswith("mlm/")]
        return family, dataclasses.replace(config, mlm=not files.keys().isdisjoint(head))
    return family, config


def headless(family: Family, config: ModelConfig, files: Collection[str]) -> tuple[ModelConfig, set[str]]:
    """The config of the same model without what makes scores of tokens, and what that is called in `files`."""
    head = {names.stored(family, name.hf, files) for name in family.names if name.path.startswith(("mlm/", "head/"))}
    if isinstance(config, EncoderConfig):
        return dataclasses.replace(config, mlm=False), head
    if isinstance(config, VisionConfig):
        return dataclasses.replace(config, labels=0), names.heads(family, files)
    return (config if config.labels else dataclasses.replace(config, tied=True)), head


def has_weights(folder: Path) -> bool:
    return has_safetensors(folder) or msgpack.found(folder)


def open_weights(folder: Path) -> Weights:
    """The tensors of a folder: its safetensors, or else what transformers' Flax models saved.

    Raises:
      CheckpointError: it has neither, or a file is truncated or corrupt.
    """
    return Reader(folder) if has_safetensors(folder) or not msgpack.found(folder) else msgpack.Reader(folder)


def shapes(config: ModelConfig, cut: int | None = None) -> Tree:
    """The shapes of a model's parameters, without any memory; `cut` as for `models.split`."""

    def make(key: Key) -> Tree:
        params = build(config).init(key)
        return params if cut is None else split(params, cut)

    return jax.eval_shape(make, jax.random.key(0))
