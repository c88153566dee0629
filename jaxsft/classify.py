"""Many images through a model: their vectors, and the scores of their classes, in the order of the data."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from jaxsft import data, sharding
from jaxsft.models import Model, logits
from jaxsft.train import place

Normalise = Callable[[Array], Array]


def scores(
    model: Model, variables: Mapping, rows: data.images.ImageRows, normalise: Normalise, *, batch_size: int, mesh: Mesh
) -> Float[np.ndarray, "N K"]:
    """The scores of each image's classes, before the softmax.

    Args:
      model: with a classifier.
      variables: {"params": ..., "lora": ...}.
      rows: the images.
      normalise: pixels 0 to 255 -> what the model reads.
      batch_size: images at one time.
      mesh: where it runs.

    Raises:
      ValueError: the model has no classifier.
    """
    tell = lambda variables, features: logits(model, variables, features)[:, 0]
    return _each(model, tell, variables, rows, normalise, batch_size, mesh)


def vectors(
    model: Model, variables: Mapping, rows: data.images.ImageRows, normalise: Normalise, *, batch_size: int, mesh: Mesh
) -> Float[np.ndarray, "N D"]:
    """The vector that the backbone makes of each image, which its classifier reads; arguments as for `scores`."""
    tell = lambda variables, features: features[:, 0, : model.config.hidden].astype(np.float32)
    return _each(model, tell, variables, rows, normalise, batch_size, mesh)


def _each(
    model: Model,
    tell: Callable[[Mapping, Array], Array],
    variables: Mapping,
    rows: data.images.ImageRows,
    normalise: Normalise,
    batch_size: int,
    mesh: Mesh,
) -> np.ndarray:
    @jax.jit
    def compute(variables: Mapping, batch: Any) -> tuple[Array, Array]:
        return batch.row, tell(variables, model.features(variables, normalise(batch.pixels)))

    process, processes = sharding.share(mesh)
    share = functools.partial(data.images.batches, process=process, processes=processes)
    batches = place(share(rows, batch_size, seed=None, epochs=1), mesh)
    found = [[sharding.to_host(x) for x in compute(variables, one.batch)] for one in batches]
    row, values = (np.concatenate(part) for part in zip(*found, strict=True))
    return values[row[:, 0] >= 0]  # without a seed they come as they lie
