"""Packed pairs: what a model says of both answers to a prompt, from rows in which the prompt stands once.

Everything is [B, K, 2] in the end: rows, the pairs of a row, chosen and rejected.
"""

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxsft import losses, tree
from jaxsft.losses import Chunk
from jaxsft.models import Model
from jaxsft.models.moe import MoE
from jaxsft.objectives.language import Objective, head_of
from jaxsft.types import Key, Mean, Metrics, Pairs, Sums, reads

Reference = Literal["live", "precomputed"]  # does it run in every step, or come with the batch?
Each = dict[str, Float[Array, "B K"]]  # of each pair: its loss and its metrics


class Pairwise(NamedTuple):
    """An objective over pairs, in the parts that training, microbatches and reports need."""

    objective: Objective  # over `Pairs`, or `Whole` of them
    prepare: "Prepare | None"  # see `train.make_step`; None where no pair's loss depends on others
    each: Callable[[Mapping, Pairs], Each]  # without dropout


class Found(NamedTuple):
    """What was found of the pairs of a whole step, and how each loss changes with the answers' log-probabilities."""

    loss: Float[Array, "B K"]
    pull_chosen: Float[Array, "B K"]
    pull_rejected: Float[Array, "B K"]
    metrics: Each


class Whole(NamedTuple):
    """Pairs of a microbatch, with what they must know of the whole step."""

    pairs: Pairs
    shared: Each  # one number for all pairs, repeated, such as KTO's kl
    found: Found | None  # where the loss of a pair depends on all others


Prepare = Callable[[Mapping, Pairs, Callable], Whole]
Tell = Callable[[Mapping, Whole, Key | None], tuple[Each, Float[Array, ""]]]  # with "loss", and `moe.balance`


def pairwise(
    tell: Tell,
    moe: MoE | None,
    prepare: Prepare | None = None,
    parts: Callable[[Pairs], dict[str, Bool[Array, "B K"]]] | None = None,
) -> Pairwise:
    """Makes an objective of what is told of each pair.

    Args:
      tell: (variables, whole, key) -> ({"loss": ..., and metrics}, balance); all are 0 where there is no pair.
      moe: of the model; in training its balance is added for each pair, times its coefficient.
      prepare: see `train.make_step`.
      parts: metrics that are means over some pairs alone, and which those are.
    """

    def objective(variables: Mapping, batch: Pairs | Whole, key: Key | None) -> Sums:
        whole = batch if isinstance(batch, Whole) else Whole(batch, {}, None)
        each, crowding = tell(variables, whole, key)
        weight = whole.pairs.exists.sum().astype(jnp.float32)
        metrics: Metrics = {name: value.sum() for name, value in each.items()}
        loss = metrics.pop("loss")
        for name, part in (parts(whole.pairs) if parts else {}).items():
            metrics[name] = Mean(metrics[name], (part & whole.pairs.exists).sum().astype(jnp.float32))
        if key is None or moe is None:
            return Sums(loss, weight, metrics)
        return Sums(loss + moe.balance * crowding * weight, weight, metrics | {"balance": crowding * weight})

    return Pairwise(objective, prepare, lambda variables, batch: tell(variables, Whole(batch, {}, None), None)[0])


def repeated(value: Array, batch: Pairs) -> Float[Array, "B K"]:
    """One number of the step, for every pair: so it is cut into microbatches like all else."""
    return jnp.full(batch.exists.shape, value, jnp.float32)


class Read(NamedTuple):
    """What a model says of the tokens of a batch."""

    features: Float[Array, "B T D"]
    logprobs: Float[Array, "B T"]  # of the token that follows, where it is an answer's; 0 elsewhere
    learned: Bool[Array, "B T"]  # does an answer's token follow?
    balance: Float[Array, ""]  # see `moe.balance`


def read(model: Model, variables: Mapping, batch: Pairs, key: Key | None, chunk: Chunk | None = None) -> Read:
    """Runs a language model over packed pairs.

    Args:
      model, variables: what runs.
      batch: the pairs.
      key: of dropout; None for none.
      chunk: see `losses.logprobs`.
    """
    targets, learned = losses.shift(batch.tokens, batch.mask, batch.segments)
    features, balance = run(model, variables, batch, key)
    lp = losses.logprobs(features, model.output(variables), targets, learned, **head_of(model, chunk))
    return Read(features, lp, learned, balance)


def run(
    model: Model, variables: Mapping, batch: Pairs, key: Key | None
) -> tuple[Float[Array, "B T D"], Float[Array, ""]]:
    """The features of packed pairs, in which a token sees its own segment and its prompt's; and `moe.balance`."""
    sees = reads(batch.segments)
    return model.learn(variables, batch.tokens, batch.positions, batch.segments, dropout=key, reads=sees)


def answers(values: Array, batch: Pairs) -> Float[Array, "B K 2"]:
    """Sums over the tokens of each answer, in float32, of [B, T] numbers or truths.

    Example:
      >>> row = lambda *x: jnp.array([x])
      >>> empty = jnp.zeros((1, 2))
      >>> batch = Pairs(*[row(1, 2, 2, 3, 5, 6, 0)] * 4, value=empty, exists=empty, row=empty, reference=empty)
      >>> answers(row(9.0, 1.0, 2.0, 3.0, 4.0, 5.0, 9.0), batch).tolist()
      [[[3.0, 3.0], [4.0, 5.0]]]
    """
    pairs = batch.exists.shape[1]
    total = lambda x, segment: jax.ops.segment_sum(x, segment, num_segments=3 * pairs + 1)
    sums = jax.vmap(total)(values.astype(jnp.float32), batch.segments)
    return sums[:, 1:].reshape(-1, pairs, 3)[..., 1:]


def ends(values: Float[Array, "B T"], batch: Pairs) -> Float[Array, "B K 2"]:
    """The value at the last token of each answer; 0 where there is none."""
    following = jnp.roll(batch.segments, -1, axis=1).at[:, -1].set(0)
    return answers(jnp.where(batch.segments == following, 0.0, values), batch)


def spread(values: Float[Array, "B K"], batch: Pairs) -> Float[Array, "B T"]:
    """Gives each token the value of the pair it stands in."""
    return jnp.take_along_axis(values, jnp.maximum(batch.segments - 1, 0) // 3, axis=1)


def index(learned: Bool[Array, "B T"], batch: Pairs) -> Int[Array, "B T"]:
    """The number of each learned token in its answer, from 0."""
    pairs = batch.exists.shape[1]
    number = jnp.cumsum(learned, axis=1) - learned
    first = lambda x, segment: jax.ops.segment_min(x, segment, num_segments=3 * pairs + 1)[segment]
    return number - jax.vmap(first)(number, batch.segments)


def weighed(
    logprobs: Float[Array, "B T"], learned: Bool[Array, "B T"], batch: Pairs, ld_alpha: float | None
) -> Float[Array, "B K 2"]:
    """Log-probabilities of answers; with LD-DPO, less of what the longer one says beyond the shorter one's length."""
    if ld_alpha is None:
        return answers(logprobs, batch)
    shortest = spread(answers(learned, batch).min(axis=-1), batch)
    return answers(logprobs * losses.ld_weights(index(learned, batch), shortest, ld_alpha), batch)


def reference(variables: Mapping) -> dict:
    """The variables of the reference: those of the policy before it learned anything, without gradient.

    That is the base without its adapter; where the base's own parameters train, `variables["reference"]` holds them as
    they were.
    """
    held = tree.flat(variables.get("reference", {}))
    params = tree.nest({path: held.get(path, leaf) for path, leaf in tree.flat(variables["params"]).items()})
    packed = {"packed": variables["packed"]} if "packed" in variables else {}
    return jax.lax.stop_gradient({"params": params} | packed)


def reference_logprobs(model: Model, variables: Mapping, batch: Pairs, chunk: Chunk | None) -> Float[Array, "B T"]:
    """Log-probabilities of the answers' tokens under the reference."""
    return read(model, reference(variables), batch, None, chunk).logprobs


def divergence(policy: Read, reference: Float[Array, "B T"], batch: Pairs, sides: int = 2) -> Float[Array, "B K"]:
    """KL of policy and reference, a token: u^2 / 2 with u = log reference / policy, over the tokens of the answers.

    These were not drawn from the policy, so it is an estimate of how far it has moved, no more; it is never negative.

    Source: Schulman 2020, "Approximating KL divergence", k2; k3, e^u - 1 - u, explodes where the policy has learned to
    avoid a token that it was shown.
    """
    ratio = jnp.where(policy.learned, reference - policy.logprobs, 0.0)
    terms, counts = (answers(x, batch)[..., :sides].sum(axis=-1) for x in (ratio**2 / 2, policy.learned))
    return terms / jnp.maximum(counts, 1.0)


def existing(x: Float[Array, "B K"], batch: Pairs) -> Float[Array, "B K"]:
    """A metric, without gradient, and 0 where there is no pair."""
    return jax.lax.stop_gradient(jnp.where(batch.exists, x, 0.0))


def mean_count(batch: Pairs) -> Float[Array, ""]:
    """Tokens of the chosen answers, a pair."""
    counts = answers(losses.shift(batch.tokens, batch.mask, batch.segments)[1], batch)[..., 0]
    return jnp.where(batch.exists, counts, 0).sum() / jnp.maximum(batch.exists.sum(), 1)
