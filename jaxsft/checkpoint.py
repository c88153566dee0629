"""Checkpoints of a run with Orbax: what trains, the optimizer, step, key, the position in the data, the configuration.

Saving is asynchronous and atomic: a step's folder appears under its name when all of it is on disk, so a process may
die at any moment. Restoring wants a state of the same shapes and shardings; the mesh may be another one.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxsft.run import RunError
from jaxsft.tree import Tree
from jaxsft.types import State

# May differ between a run and its continuation: they do not change what is computed. What data.train holds is checked
# by its content, through the position, wherever the files lie now.
FREE = ("run.", "export.", "mesh.", "train.save_every", "train.keep", "train.eval_every", "train.log_every")
FREE += ("data.train", "data.eval", "data.info", "data.workers", "data.cache", "reward.workers", "reward.timeout")
FREE += ("probe",)


def open_folder(folder: Path, keep: int = 3) -> ocp.CheckpointManager:
    """Opens `folder`, made if needed; the last `keep` checkpoints stay. Close it with `close`."""
    logging.getLogger("absl").setLevel(logging.ERROR)
    # What a killed process was writing is half a checkpoint: it goes when the folder is opened again.
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, cleanup_tmp_directories=True)
    return ocp.CheckpointManager(folder.resolve(), options=options)


def save(manager: ocp.CheckpointManager, state: State, position: Mapping, config: Mapping) -> None:
    """Begins to write a checkpoint; training may go on, the arrays were copied.

    Args:
      manager: from `open_folder`.
      state: as the step returned it.
      position: the data iterator's, after the last batch that `state` has learned from.
      config: of the run, JSON values.

    Raises:
      RunError: this or an earlier write failed, for a full disk most often.
    """
    try:
        manager.save(
            int(state.step),
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(_raw(state)),
                position=ocp.args.JsonSave(dict(position)),
                config=ocp.args.JsonSave(dict(config)),
            ),
        )
    except Exception as error:
        raise _failed(manager, error) from error


def close(manager: ocp.CheckpointManager) -> None:
    """Waits until the last write is on disk.

    Raises:
      RunError: it failed.
    """
    try:
        manager.wait_until_finished()
    except Exception as error:
        raise _failed(manager, error) from error
    finally:
        manager.close()


def _failed(manager: ocp.CheckpointManager, error: Exception) -> RunError:
    last = max(manager.all_steps(), default=None)
    good = "there is no earlier one" if last is None else f"the last good one is of step {last}"
    reason = " ".join(str(error).split())[:300]
    return RunError(
        f"could not save a checkpoint in {manager.directory} ({type(error).__name__}: {reason}); {good}. "
        "Is the disk full? Free some space, then continue with --run.resume true"
    )


def restore(manager: ocp.CheckpointManager, like: State, config: Mapping) -> tuple[State, dict[str, Any]] | None:
    """Reads the newest checkpoint.

    Args:
      manager: from `open_folder`.
      like: a state of the shapes, dtypes and shardings wanted.
      config: of the run that continues.

    Returns:
      (state, position), or None where there is no checkpoint yet.

    Raises:
      RunError: the checkpoint's configuration contradicts `config`; names the keys.
    """
    step = manager.latest_step()
    if step is None:
        return None
    check(read_config(Path(manager.directory) / str(step)), config)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), _raw(like))
    try:
        found = manager.restore(
            step, args=ocp.args.Composite(state=ocp.args.StandardRestore(shapes), position=ocp.args.JsonRestore())
        )
    except Exception as error:
        folder = Path(manager.directory) / str(step)
        raise RunError(
            f"checkpoint {folder} cannot be read ({type(error).__name__}: {str(error)[:300]}); delete that folder to "
            "continue from the one before it"
        ) from error
    state = found.state
    return state._replace(key=jax.random.wrap_key_data(state.key)), found.position


def check(saved: Mapping, config: Mapping) -> None:
    """Compares two configurations by dotted key; keys that do not change what is computed may differ.

    Raises:
      RunError: names each key that differs.

    Example:
      >>> check({"optim.clip": 1.0, "run.resume": False}, {"optim.clip": 1.0, "run.resume": True})
    """
    keys = [key for key in {**saved, **config} if not key.startswith(FREE)]
    wrong = [f"{k} is {config.get(k)!r}, was {saved.get(k)!r}" for k in keys if saved.get(k) != config.get(k)]
    if wrong:
        raise RunError(
            f"the configuration contradicts the checkpoint: {'; '.join(wrong)}. "
            "Give the values it was trained with, or start anew in another run.output_dir"
        )


def read_config(step_folder: Path) -> dict[str, Any]:
    """Reads the configuration, by dotted key, of the checkpoint in RUN/checkpoints/STEP."""
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
        return reader.restore((step_folder / "config").resolve())


def read_trained(step_folder: Path) -> Tree:
    """Reads the trained leaves alone, as numpy arrays, of the checkpoint in RUN/checkpoints/STEP.

    Raises:
      RunError: there is no checkpoint.
    """
    if not (step_folder / "state").is_dir():
        raise RunError(f"{step_folder} is no checkpoint; give RUN/checkpoints/STEP")
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        shapes = reader.metadata((step_folder / "state").resolve()).item_metadata.tree["trainable"]
        item = {"trainable": jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)}
        how = jax.tree.map(lambda x: ocp.RestoreArgs(restore_type=np.ndarray), item)
        args = ocp.args.PyTreeRestore(item=item, restore_args=how, partial_restore=True)
        return reader.restore((step_folder / "state").resolve(), args=args)["trainable"]


def _raw(state: State) -> State:
    return state._replace(key=jax.random.key_data(state.key))
