"""Classification of images: augmentation, a backbone with a classifier, and the cross entropy."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from jaxsft import augment, losses
from jaxsft.models import Model, logits
from jaxsft.objectives.language import Objective
from jaxsft.types import Images, Key, Mean, Sums


class Classification(NamedTuple):
    """An objective over `Images`, and what is done to a whole batch before it is cut into microbatches."""

    objective: Objective
    prepare: Callable[[Mapping, Any, Callable], Any]


def classification(
    model: Model,
    normalise: Callable[[Array], Array],
    *,
    how: augment.Config = augment.NONE,
    weights: Float[ArrayLike, "K"] | None = None,
    key: Key | None = None,
) -> Classification:
    """The cross entropy of each image's class, divided by the weight of all images of the step.

    Args:
      model: with a classifier of K classes.
      normalise: pixels 0 to 255 -> what the model reads, such as `pixels.normalise` of its preprocessing.
      how: what is done to the images in training; evaluation, without a key of dropout, sees them as they are, and
        measures the plain cross entropy, without weights and smoothing.
      weights: of the classes.
      key: of augmentation; each image folds in its turn.

    Returns:
      the objective, with the metric accuracy: the share of images whose class has the highest score. A mixed image
      counts as its own.

    Raises:
      ValueError: the model has no classifier.
    """
    classes = model.config.labels
    if not classes:
        raise ValueError("this model has no classifier; load it with labels, the number of classes")
    key = jax.random.key(0) if key is None else key
    change = functools.partial(augment.apply, how, key=key, classes=classes, normalise=normalise)
    plain = functools.partial(augment.apply, augment.NONE, key=key, classes=classes, normalise=normalise)

    def objective(variables: Mapping, batch: Images, key: Key | None) -> Sums:
        targets = batch.targets
        if targets is None:  # not prepared: the whole batch is here
            batch = plain(batch) if key is None else change(batch)
            targets = batch.targets
            assert targets is not None
        exists = (batch.row >= 0).astype(jnp.int32)
        # Batch norms that train say by a term of value 0 where their averages are to go (`models.vision.layers`).
        features, drift = model.learn(variables, batch.pixels, segments=exists, dropout=key)
        scores = logits(model, variables, features)[:, 0]
        training = {"weights": weights, "smoothing": how.label_smoothing} if key is not None else {}
        loss, weight = losses.cross_entropy(scores, targets, **training)
        real = exists[:, 0].astype(jnp.float32)
        loss, weight = (loss * real).sum(), (weight * real).sum()
        right = (scores.argmax(-1) == batch.label[:, 0]) * real
        return Sums(loss + drift * weight, weight, {"accuracy": Mean(right.sum(), real.sum())})

    def prepare(variables: Mapping, batch: Images, over: Callable) -> Images:
        return change(batch)

    return Classification(objective, prepare)
