"""A run on this machine: its start, its folder, its progress bar, its metrics file."""

import json
import os
import shutil
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils

from jaxsft import cache, hosts

METRICS = "metrics.jsonl"
WRITTEN = (
    METRICS,
    "loss.png",
    "metrics.png",
    "calibration.png",
    "confusion.png",
    "labels.json",
    "classes.json",
    "mistakes.html",
    "predictions.jsonl",
    "preprocessor_config.json",
    "samples.jsonl",
    "generated_predictions.jsonl",
    "generation.json",
    "checkpoints",
    "adapter",
    "merged",
)  # in a run's folder


class RunError(Exception):
    """A run that cannot start or go on; the message says why and what to do."""


@dataclass(frozen=True)
class Config:
    """Where a run keeps its files, and how it starts."""

    output_dir: str = "runs/out"
    """the folder for everything the run writes"""
    resume: bool = False
    """continue from the last checkpoint in output_dir, or start if there is none"""
    overwrite: bool = False
    """delete a former run in output_dir first: its metrics, curve, checkpoints, adapter and merged model"""
    samples: int = 6
    """held-out rows that are answered before and after, for people to read"""
    plan: bool = False
    """print what the run would need of each device, as the compiler sees it, and stop before any weight is read; a mesh
    that names all its lengths may have more devices than this machine"""
    device_gb: float | None = None
    """with plan: the memory of a device in 10^9 bytes; by default what the device says"""
    distributed: bool = False
    """several processes, on one host or many, work together; TPU pods, Slurm and Open MPI tell who they are, elsewhere
    the three keys below do, or the variables JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID"""
    coordinator_address: str | None = None
    """HOST:PORT of process 0, where the others find it"""
    num_processes: int | None = None
    """how many processes there are"""
    process_id: int | None = None
    """which of them this is, from 0"""
    start_timeout: int = 300
    """seconds until all processes must be there"""
    heartbeat_timeout: int = 60
    """seconds without a sign of life after which a process counts as dead, and the others end"""

    @property
    def processes(self) -> dict[str, Any]:
        """What `hosts.meet` wants to know."""
        names = ("coordinator_address", "num_processes", "process_id", "start_timeout", "heartbeat_timeout")
        return {name: getattr(self, name) for name in names}


def start(config: Config) -> Path:
    """Prepares the process and the output folder.

    Raises:
      RunError: the folder holds another run, or is a file.
      HostsError: see `hosts.meet`.
    """
    if config.distributed:
        hosts.meet(**config.processes)
    elif config.coordinator_address or config.num_processes or config.process_id:
        raise RunError("run.coordinator_address, num_processes and process_id are for --run.distributed true; add it")
    folder = Path(config.output_dir)
    if folder.exists() and not folder.is_dir():
        raise RunError(f"run.output_dir {folder} is a file; choose a folder")
    used = (folder / METRICS).exists() or (folder / "checkpoints").exists()
    if used and not config.resume:
        if not config.overwrite:
            raise RunError(
                f"run.output_dir {folder} holds another run; continue it with --run.resume true, "
                "replace it with --run.overwrite true, or choose another folder"
            )
        if jax.process_index() == 0:
            _delete_run(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if jax.process_count() > 1:  # nobody writes before the former run is gone
        multihost_utils.sync_global_devices("jaxsft.run.start")
    return folder


def _delete_run(folder: Path) -> None:
    """Deletes what a run writes, and nothing else that lies there."""
    for name in WRITTEN:
        if (folder / name).is_dir():
            shutil.rmtree(folder / name)
        else:
            (folder / name).unlink(missing_ok=True)


def guard(main: Callable[[], None]) -> None:
    """Runs a script's main: an error that jaxsft raised ends it with its message alone, any other with a traceback.

    On several hosts either ends the others, too. A run that was told to end exits with 128 and the signal's number.
    What is compiled meanwhile is kept, see `cache.keep_programs`.
    """
    cache.keep_programs()
    try:
        main()
    except hosts.Stopped as stopped:
        if jax.process_index() == 0:
            print(f"\n{stopped}")
        raise SystemExit(stopped.code) from None
    except BaseException as error:
        where = error.__traceback__
        while where and where.tb_next:
            where = where.tb_next
        ours = where and where.tb_frame.f_globals.get("__name__", "").split(".")[0] == "jaxsft"
        if not isinstance(error, RunError) and not (ours and isinstance(error, ValueError)):
            if hosts.several():
                traceback.print_exc()
                hosts.fail(error)
            raise
        print(f"\nerror: {error}", file=sys.stderr)
        hosts.fail(error)
        raise SystemExit(1) from None


class Log:
    """`metrics.jsonl`, one JSON object a line, and the progress bar that shows the last one.

    Args:
      folder: the run's folder.
      step: the step that training continues from; lines of later steps, written before a kill, are taken out.
      shows: the metric that the bar shows.
      unit: what a step reads, in the plural.
    """

    def __init__(self, folder: Path, step: int = 0, shows: str = "loss", unit: str = "tokens"):
        self.file, self.step, self.shows, self.unit, self._bar = folder / METRICS, step, shows, unit, None
        self.writes = jax.process_index() == 0
        if self.writes:
            keep_until(self.file, step)
        self._speed, self._window = 0.0, deque(maxlen=20)  # (time, tokens) of the last steps

    @contextmanager
    def progress(self, steps: int, label: str = "training"):
        """Shows the bar while the block runs."""
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        figures = TextColumn(self.shows + " {task.fields[shown]} {task.fields[speed]} " + f"{self.unit}/s left")
        columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), figures, TimeRemainingColumn()]
        with Progress(*columns, disable=not self.writes) as bar:
            task = bar.add_task(label, total=steps, completed=self.step, shown="-", speed="-")
            self._bar = lambda **fields: bar.update(task, **fields)
            self._window.append((time.perf_counter(), 0))
            try:
                yield
            finally:
                self._bar = None

    def train(self, step: int, metrics: Mapping[str, float], tokens: int, *, write: bool = True) -> None:
        """Takes one finished step; `tokens` are those it read, padding left out, or what else the unit is."""
        self.step = step
        self._window.append((time.perf_counter(), tokens))
        (since, _), *steps = self._window
        if steps:  # the first step after an evaluation only starts the clock
            self._speed = sum(n for _, n in steps) / max(self._window[-1][0] - since, 1e-9)
        if write:
            self._write({"step": step, **metrics, f"{self.unit}_per_second": round(self._speed, 1)})
        if self._bar:
            self._bar(completed=step, shown=f"{metrics[self.shows]:.4f}", speed=f"{self._speed:,.0f}")

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Takes what was measured on held-out rows after `step` steps; its time does not count as training."""
        self._write({"step": step, **{f"eval_{name}": value for name, value in metrics.items()}})
        self._window.clear()

    def _write(self, line: Mapping[str, float]) -> None:
        if self.writes:
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """Reads a metrics file; a last line that a kill cut short is left out.

    Raises:
      RunError: another line is not JSON.
    """
    lines = file.read_text(encoding="utf-8").split("\n") if file.exists() else []
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows += [json.loads(line)] if line else []
        except ValueError:
            if number != len(lines):
                raise RunError(f"{file} line {number} is not JSON; restore it or start in another folder") from None
    return rows


def keep_until(file: Path, step: int) -> None:
    """Takes the lines of later steps out of a file whose rows each have a "step"; of step 0 all are."""
    rows = [row for row in read_metrics(file) if row["step"] <= step] if step else []
    if file.exists() or rows:
        part = file.with_suffix(".part")
        part.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        os.replace(part, file)
