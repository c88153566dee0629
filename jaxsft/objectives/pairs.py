"""Packed pairs: what a model says of both answers to a prompt, from rows in which the prompt stands once.

Everything is [B, K, 2] in the end: rows, the pairs of a row, chosen and rejected.
"""

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxsft import losses, tree
from jaxsft.models import Model
from jaxsft.objectives.language import Objective
from jaxsft.types import Key, Metrics, Pairs, Sums, reads

Reference = Literal["live", "batch"]  # is it run, or does it come with the batch?
Each = dict[str, Float[Array, "B K"]]  # of each pair: its loss and its metrics


class Pairwise(NamedTuple):
    """An objective over pairs, in the parts that training, microbatches and reports need."""

    objective: Objective  # over `Pairs`, or `Known` of them
    prepare: Callable | None  # see `train.make_step`; None where no pair's loss depends on others
    each: Callable[[Mapping, Pairs], Each]  # without dropout


class Known(NamedTuple):
    """Pairs, with what each must know of all pairs of the step; what is one number for all is repeated."""

    pairs: Pairs
    whole: dict[str, Float[Array, "B K"]]


class Read(NamedTuple):
    """What a model says of the tokens of a batch."""

    features: Float[Array, "B T D"]
    logprobs: Float[Array, "B T"]  # of the token that follows, where it is an answer's; 0 elsewhere
    learned: Bool[Array, "B T"]  # does an answer's token follow?
    balance: Float[Array, ""]  # see `moe.balance`


def read(model: Model, variables: Mapping, batch: Pairs, key: Key | None, chunk: int | None = None) -> Read:
    """Runs a language model over packed pairs."""
    targets, learned = losses.shift(batch.tokens, batch.mask, batch.segments)
    features, balance = run(model, variables, batch, key)
    bent = {"scale": model.config.logit_scale, "soft_cap": model.config.logit_soft_cap, "chunk": chunk}
    lp = losses.logprobs(features, model.output(variables), targets, learned, **bent)
    return Read(features, lp, learned, balance)


def run(model, variables, batch, key):
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
    before = jnp.cumsum(learned, axis=1) - learned
    first = lambda x, segment: jax.ops.segment_min(x, segment, num_segments=3 * pairs + 1)[segment]
    return before - jax.vmap(first)(before, batch.segments)


def reference(variables: Mapping) -> dict:
    """The variables of the reference: those of the policy before it learned anything, without gradient.

    That is the base without its adapter; where the base's own parameters train, `variables["reference"]` holds them as
    they were.
    """
    held = tree.flat(variables.get("reference", {}))
    params = tree.nest({path: held.get(path, leaf) for path, leaf in tree.flat(variables["params"]).items()})
    packed = {"packed": variables["packed"]} if "packed" in variables else {}
    return jax.lax.stop_gradient({"params": params} | packed)


def before(model: Model, variables: Mapping, batch: Pairs, chunk: int | None) -> Float[Array, "B T"]:
    """Log-probabilities of the answers' tokens under the reference."""
    return read(model, reference(variables), batch, None, chunk).logprobs


def divergence(policy: Read, before: Float[Array, "B T"], batch: Pairs, sides: int = 2) -> Float[Array, "B K"]:
    """KL of policy and reference, a token: u^2 / 2 with u = log reference / policy, over the tokens of the answers.

    These were not drawn from the policy, so it is an estimate of how far it has moved, no more; it is never negative.

    Source: Schulman 2020, "Approximating KL divergence", k2; k3, e^u - 1 - u, explodes where the policy has learned to
    avoid a token that it was shown.
    """
    ratio = jnp.where(policy.learned, before - policy.logprobs, 0.0)
    terms, counts = (answers(x, batch)[..., :sides].sum(axis=-1) for x in (ratio**2 / 2, policy.learned))
    return terms / jnp.maximum(counts, 1.0)


def known(x: Float[Array, "B K"], batch: Pairs) -> Float[Array, "B K"]:
    """A metric, 0 where there is no pair."""
    return jax.lax.stop_gradient(jnp.where(batch.exists, x, 0.0))


def sums(losses_: Float[Array, "B K"], metrics: Each, batch: Pairs, balance: Float[Array, ""] | None = None) -> Sums:
    """Adds up pairs; `balance` is what a mixture of experts adds for each of them, where it trains."""
    weight = batch.exists.sum().astype(jnp.float32)
    total: Metrics = {name: value.sum() for name, value in metrics.items()}
    if balance is None:
        return Sums(losses_.sum(), weight, total)
    return Sums(losses_.sum() + balance * weight, weight, total | {"balance": balance * weight})
