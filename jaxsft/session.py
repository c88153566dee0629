"""A training run from rows to the last state: what every training script does between loading and exporting.

It builds optimizer, state and compiled step, continues from the last checkpoint if there is one, and fits.
"""

import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from jaxsft import checkpoint, data, optim, sharding
from jaxsft.objectives import Objective
from jaxsft.run import Log, RunError
from jaxsft.train import Config, fit, init, make_evaluation, make_step, place
from jaxsft.tree import Tree
from jaxsft.types import State


def learn(
    objective: Objective,
    trainable: Tree,
    frozen: Tree,
    rows: data.PackedRows,
    held_out: data.PackedRows | None,
    *,
    config: Config,
    optimizer: optim.Config,
    mesh: Mesh,
    folder: Path,
    recorded: Mapping[str, Any],
) -> State:
    """Trains on rows, from the last checkpoint in `folder` if it has one: what every training script does.

    Args:
      objective: (variables, batch, key) -> Sums.
      trainable, frozen: the variables, split; `trainable` is donated.
      rows: packed rows to learn.
      held_out: packed rows to measure on, or None.
      config, optimizer: how long, in what pieces, with what updates.
      mesh: where it runs.
      folder: takes metrics.jsonl and checkpoints/.
      recorded: the whole configuration of the run by dotted key; a checkpoint of another one is refused.

    Returns:
      the last state.

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
    state = init(trainable, tx, jax.random.key(c.seed), mesh)
    step = make_step(objective, tx, microbatches=c.microbatches, shardings=sharding.of(state))
    measure = make_evaluation(objective)
    share = functools.partial(data.batches, process=jax.process_index(), processes=jax.process_count())

    def evaluate(state: State) -> float:
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
        return fit(
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
    finally:
        checkpoint.close(manager)
