"""What every training script does: open a run, load what learns, learn it.

A script says what is learned of which rows, and in what words that is told to people; the rest is here.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxsft import checkpoint, data, hub, optim, report, run, sharding, tuning
from jaxsft.objectives import Objective
from jaxsft.run import Log, RunError
from jaxsft.train import Config, Prepare, fit, init, make_evaluation, make_step, place
from jaxsft.tuning import Learner
from jaxsft.types import State


def start(config: run.Config, mesh: sharding.Config) -> tuple[Path, Mesh]:
    """Prepares the run's folder and the devices, in that order: several hosts meet before they see each other's.

    Raises:
      RunError, ValueError: see `run.start`, `sharding.mesh`.
    """
    folder = run.start(config)
    return folder, sharding.mesh(**dataclasses.asdict(mesh))


def load(model: hub.Config, how: tuning.Config, mesh: Mesh, *, seed: int) -> Learner:
    """Loads a checkpoint, and splits its variables by what learns.

    Args:
      model: which, and in what precision.
      how: what learns.
      mesh: where it lies.
      seed: draws the adapter.

    Raises:
      CheckpointError, ValueError: see `hub.load_variables`, `tuning.plan`, `tuning.apply`.
    """
    family, shape = hub.read_config(hub.resolve(model.path))
    plan = tuning.plan(how, shape.layers)
    loaded, base = hub.load_variables(
        model.path,
        mesh,
        quantise=model.quantise,
        dtype=jnp.dtype(model.dtype),
        full_precision=plan.trainable,
        cut=plan.cut,
        remat=model.remat,
        lora_dropout=plan.lora.dropout if plan.lora else 0.0,
    )
    trainable, frozen = tuning.apply(plan, base, jax.random.key(seed), mesh=mesh, rules=family.rules)
    report.summary("model", tuning.describe(plan, trainable, frozen))
    return Learner(loaded, plan, trainable, frozen)


def draw(model: hub.Config, mesh: Mesh, *, seed: int) -> Learner:
    """Makes a model of the shape that config.json describes, with random weights that all learn."""
    made, params = hub.init(model.path, jax.random.key(seed), mesh, dtype=jnp.dtype(model.dtype), remat=model.remat)
    plan = tuning.plan(tuning.Config(method="full"), made.config.layers)
    report.summary("model", tuning.describe(plan, {"params": params}, {}))
    return Learner(made, plan, {"params": params}, {})


def learn(
    objective: Objective,
    learner: Learner,
    rows: data.PackedRows,
    held_out: data.PackedRows | None,
    *,
    prepare: Prepare | None = None,
    config: Config,
    optimizer: optim.Config,
    mesh: Mesh,
    folder: Path,
    recorded: Mapping[str, Any],
) -> Learner:
    """Trains on rows, from the last checkpoint in `folder` if it has one.

    Args:
      objective: (variables, batch, key) -> Sums.
      learner: what learns; its trainable arrays are donated.
      rows: packed rows to learn.
      held_out: packed rows to measure on, or None.
      prepare: see `train.make_step`.
      config, optimizer: how long, in what pieces, with what updates.
      mesh: where it runs.
      folder: takes metrics.jsonl and checkpoints/.
      recorded: the whole configuration of the run by dotted key; a checkpoint of another one is refused.

    Returns:
      the learner, with what it has learned.

    Raises:
      RunError: see `fit`; a contradicting checkpoint; a batch that the mesh cannot share out.
    """
    c, shards = config, mesh.shape["data"] * mesh.shape["fsdp"]
    if c.batch_size % (shards * c.microbatches):
        raise RunError(
            f"train.batch_size is {c.batch_size}; it must divide by microbatches x data x fsdp = "
            f"{c.microbatches} x {mesh.shape['data']} x {mesh.shape['fsdp']}"
        )
    steps = c.max_steps or math.ceil(c.epochs * len(rows) / c.batch_size)
    whole = None if c.max_steps or c.epochs % 1 else int(c.epochs)  # whole epochs end with a padded batch
    tx, rate = optim.build(optimizer, steps)
    frozen = learner.frozen
    state = init(learner.trainable, tx, jax.random.key(c.seed), mesh)
    step = make_step(objective, tx, prepare=prepare, microbatches=c.microbatches, shardings=sharding.of(state))
    measure = make_evaluation(objective)
    share = functools.partial(data.batches, process=jax.process_index(), processes=jax.process_count())

    def evaluate(state: State) -> Mapping[str, float]:
        held = share(held_out or rows, c.batch_size, seed=None, epochs=1)
        return measure(state.trainable, frozen, place(held, mesh))

    manager = checkpoint.open_folder(folder / "checkpoints", c.keep)
    position = None
    try:
        if found := checkpoint.restore(manager, state, recorded):
            state, position = found
        log = Log(folder, int(state.step))
        if held_out is not None and position is None:
            log.evaluation(0, evaluate(state))
        state = fit(
            step,
            state,
            frozen,
            place(share(rows, c.batch_size, seed=c.seed, epochs=whole, position=position), mesh),
            steps=steps,
            log=log,
            rate=rate,
            evaluate=None if held_out is None else evaluate,
            save=lambda state, position: checkpoint.save(manager, state, position, recorded),
            eval_every=c.eval_every,
            save_every=c.save_every,
            log_every=c.log_every,
        )
        return learner._replace(trainable=state.trainable)
    finally:
        checkpoint.close(manager)
