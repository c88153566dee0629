"""The training step and the loop around it.

The step is one compiled function of (state, frozen, batch): it sums loss and gradient over microbatches and devices and
divides once by the number of learned tokens, so a batch gives the same gradient however it is split. `state` is donated
and comes back; `frozen` only goes in. The loop never waits for a step to learn its loss: it reads the metrics of a step
while later ones run.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array

from jaxsft import hosts, optim, sharding, tree
from jaxsft.hosts import Stopped
from jaxsft.objectives import Objective
from jaxsft.run import Log, RunError
from jaxsft.tree import Tree
from jaxsft.types import Key, Mean, Metrics, State, Sums

AHEAD = 2  # steps in flight before the loop looks at a loss


@dataclass(frozen=True)
class Config:
    """How long and in what pieces to train."""

    max_steps: int | None = None
    """optimizer steps; by default as many as epochs take"""
    epochs: float = 1.0
    """passes over the data, where max_steps is not given"""
    batch_size: int = 8
    """rows of one optimizer step, over all devices and microbatches"""
    microbatches: int = 1
    """pieces that a batch is computed in, one after the other, to save memory; the result is the same"""
    eval_every: int = 0
    """steps between evaluations on data.eval; 0 evaluates before and after only"""
    save_every: int = 500
    """steps between checkpoints; one is written at the end as well, and 0 writes only that"""
    keep: int = 3
    """checkpoints that stay, the last ones"""
    log_every: int = 1
    """steps between lines of metrics.jsonl"""
    seed: int = 0
    """of the adapter, the order of the data and dropout"""


@dataclass(frozen=True)
class Pretraining(Config):
    """How long and in what pieces to train on plain text, and what is predicted of it."""

    objective: Literal["causal", "masked"] = "causal"
    """causal: each token from those before it; masked: hidden tokens from both sides, for encoders"""
    mask_rate: float = 0.15
    """masked: the share of tokens that is predicted"""
    whole_words: bool = False
    """masked: choose words, with all their tokens, instead of tokens"""


Step = Callable[[State, Tree, Any], tuple[State, Metrics]]
Prepare = Callable[[Mapping, Any, Callable], Any]


def init(trainable: Tree, tx: optax.GradientTransformation, key: Key, mesh: Mesh | None = None) -> State:
    """Makes the state before the first step; the optimizer holds arrays for the trained leaves alone.

    Args:
      trainable: the leaves that learn, from `tree.partition`.
      tx: an Optax transformation.
      key: of dropout.
      mesh: where scalars go, whole on every device; one device by default.

    Example:
      >>> state = init({"w": jnp.ones(3)}, optax.sgd(0.1), jax.random.key(0))
      >>> int(state.step)
      0
    """
    state = State(jnp.zeros((), jnp.int32), trainable, tx.init(trainable), key)
    if mesh is None:
        return state
    spread = jax.jit(lambda x: x, out_shardings=sharding.whole(mesh))
    return jax.tree.map(lambda x: x if isinstance(x.sharding, NamedSharding) else spread(x), state)


def make_step(
    objective: Objective,
    tx: optax.GradientTransformation,
    *,
    prepare: Prepare | None = None,
    microbatches: int = 1,
    shardings: State | None = None,
) -> Step:
    """Compiles the training step.

    Args:
      objective: (variables, batch, key) -> Sums.
      tx: the Optax transformation.
      prepare: for losses that look at the whole batch (KTO's KL, a sort over all pairs): (variables, batch, over) ->
        batch, which tells each row what it must know of the others before the batch is cut. `over(f)` computes
        f(variables, piece, key) -> arrays [rows, ...] piece by piece, with the key that `objective` gets for the piece,
        and gives them for all rows. It is called where there are several microbatches; of an uncut batch the objective
        sees the whole by itself.
      microbatches: pieces of equal row count that the batch is computed in, in sequence.
      shardings: `sharding.of(state)`, so that what comes back lies as what went in; needed with more than one device.

    Returns:
      step(state, frozen, batch) -> (state, metrics); `state` is donated. Metrics are scalars on the device: loss (mean
      over learned tokens), grad_norm (before clipping), trained_tokens, and the objective's own.

    Example:
      >>> fit = lambda variables, batch, key: Sums(jnp.sum((variables["w"] - batch) ** 2), jnp.float32(batch.size), {})
      >>> tx = optax.sgd(0.5)
      >>> step = make_step(fit, tx)
      >>> state, metrics = step(init({"w": jnp.zeros(())}, tx, jax.random.key(0)), {}, jnp.array([2.0, 4.0]))
      >>> float(state.trainable["w"]), float(metrics["loss"])
      (3.0, 10.0)
    """

    def step(state: State, frozen: Tree, batch: Any) -> tuple[State, Metrics]:
        key = jax.random.fold_in(state.key, state.step)

        def total(trainable: Tree, batch: Any, key: Key) -> tuple[Array, Sums]:
            sums = objective(tree.combine(trainable, frozen), batch, key)
            return sums.loss, sums

        grad = jax.grad(total, has_aux=True)
        if microbatches == 1:
            grads, sums = grad(state.trainable, batch, key)
        else:
            keys = jax.random.split(key, microbatches)
            cut = lambda batch: sharding.cut(batch, microbatches)
            if prepare is not None:
                variables = tree.combine(state.trainable, frozen)
                look = lambda f: jax.lax.map(lambda piece: f(variables, *piece), (cut(batch), keys))
                batch = prepare(variables, batch, lambda f: sharding.join(look(f)))
            pieces = (cut(batch), keys)
            add = lambda carry, piece: (jax.tree.map(jnp.add, carry, grad(state.trainable, *piece)), None)
            first = jax.tree.map(lambda x: x[0], pieces)
            zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(grad, state.trainable, *first))
            grads, sums = jax.lax.scan(add, zeros, pieces)[0]
        weight = jnp.maximum(sums.weight, 1.0)
        grads = jax.tree.map(lambda g: g / weight.astype(g.dtype), grads)
        updates, opt_state = tx.update(grads, state.opt_state, state.trainable)
        metrics = {
            "loss": sums.loss / weight,
            "grad_norm": optax.tree.norm(optim.weights(grads)),
            "trained_tokens": sums.weight,
            **{name: _mean(value, weight) for name, value in sums.metrics.items()},
        }
        trainable = optax.apply_updates(state.trainable, updates)
        return State(state.step + 1, cast(Tree, trainable), opt_state, state.key), metrics

    if shardings is None:
        return jax.jit(step, donate_argnums=0)
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))


def _mean(value: Array | Mean, weight: Array) -> Array:
    return value.total / jnp.maximum(value.weight, 1.0) if isinstance(value, Mean) else value / weight


class Placed(NamedTuple):
    """A batch on the devices."""

    batch: Any
    tokens: int  # that are not padding, of all processes
    position: Mapping[str, Any]  # of the data iterator, after this batch


def place(batches: Iterable, mesh: Mesh) -> Iterator[Placed]:
    """Puts batches on the mesh, one ahead of the one in use."""
    _, shares = sharding.share(mesh)

    def put(batch) -> Placed:
        # The shape of all rows is said, since processes that have the same ones may have other pieces of them.
        shape = lambda x: (x.shape[0] * shares, *x.shape[1:])
        make = lambda x, where: jax.make_array_from_process_local_data(where, np.asarray(x), shape(x))
        placed = jax.tree.map(make, batch.tokens, sharding.batch(batch.tokens, mesh))
        return Placed(placed, batch.count * shares, batch.position)

    ahead = None
    for batch in batches:
        placed = put(batch)
        if ahead is not None:
            yield ahead
        ahead = placed
    if ahead is not None:
        yield ahead


def fit(
    step: Step,
    state: State,
    frozen: Tree,
    batches: Iterable[Placed],
    *,
    steps: int,
    log: Log,
    rate: Callable[[int], Any],
    evaluate: Callable[[State], Mapping[str, float]] | None = None,
    save: Callable[[State, Mapping], None] | None = None,
    eval_every: int = 0,
    save_every: int = 0,
    log_every: int = 1,
) -> State:
    """Trains until step `steps`.

    Args:
      step: from `make_step`.
      state: where to begin; it is donated.
      frozen: the variables that do not train.
      batches: placed batches, the next one first.
      steps: the number of the last step, counted from the very first run.
      log: takes the metrics.
      rate: step -> learning rate, for the log.
      evaluate, eval_every: measures held-out rows every so many steps, and at the end.
      save, save_every: writes a checkpoint every so many steps, and at the end.
      log_every: steps between lines of the log.

    Returns:
      the last state.

    Raises:
      RunError: the loss is not finite (nothing after the last good step was saved), or the data ended too early.
      Stopped: the process was told to end, see `hosts.notice`; the state was saved after the step it was in.
    """
    at, waiting, stop = int(state.step), deque(), None

    def look(upto: int) -> None:
        while len(waiting) > upto:
            number, metrics, tokens = waiting.popleft()
            values = {name: float(value) for name, value in jax.device_get(metrics).items()}
            if not math.isfinite(values["loss"] + values["grad_norm"]):
                raise RunError(
                    f"step {number}: loss {values['loss']}, gradient norm {values['grad_norm']}. Nothing was saved"
                    " since the last good checkpoint. Lower optim.learning_rate, look at the data"
                )
            first = {"loss": values.pop("loss"), "learning_rate": float(rate(number - 1))}
            learned = values.pop("trained_tokens")  # of images the weight of their classes, which is no whole number
            values[f"trained_{log.unit}"] = int(learned) if log.unit == "tokens" else round(learned, 3)
            log.train(number, first | values, tokens, write=number % log_every == 0 or number == steps)

    with log.progress(steps), hosts.notice() as told:
        for batch in batches if at < steps else ():
            state, metrics = step(state, frozen, batch.batch)
            at += 1
            waiting.append((at, metrics, batch.tokens))
            look(AHEAD)
            last = at == steps
            stop = None if last else told(at)
            if evaluate and (last or (eval_every and at % eval_every == 0 and not stop)):
                look(0)
                log.evaluation(at, evaluate(state))
            if save and (last or stop or (save_every and at % save_every == 0)):
                look(0)
                save(state, batch.position)
            if last or stop:
                break
        look(0)
        if stop := told(at) if at == steps else stop:
            raise Stopped(stop, at)
    if at < steps:
        raise RunError(f"the data ended after step {at} of {steps}; lower train.max_steps or raise train.epochs")
    return state


def make_evaluation(objective: Objective) -> Callable[[Tree, Tree, Iterable[Placed]], dict[str, float]]:
    """Compiles evaluation: the means over all that is learned of some batches (tokens, or pairs), dropout off.

    Returns:
      evaluate(trainable, frozen, batches) -> {"loss": ..., and the objective's own metrics}.
    """
    sums = jax.jit(lambda trainable, frozen, batch: objective(tree.combine(trainable, frozen), batch, None))

    def evaluate(trainable: Tree, frozen: Tree, batches: Iterable[Placed]) -> dict[str, float]:
        parts = jax.device_get([sums(trainable, frozen, batch.batch) for batch in batches])
        whole = jax.tree.map(lambda *x: np.sum(x, dtype=np.float64), *parts)
        if not whole.weight:
            raise RunError("data.eval has nothing that is learned; nothing can be measured on it")
        values = {"loss": whole.loss, **whole.metrics}
        return {name: float(_mean(value, whole.weight)) for name, value in values.items()}

    return evaluate
