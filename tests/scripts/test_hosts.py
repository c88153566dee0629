"""One run that moves: between one process and two, told to end, killed, and all the same what it would have been."""

import re
import signal
import socket
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxsft import hub
from jaxsft.run import read_metrics

STEPS = 60
GLOO = re.compile(r"\[Gloo\] Rank|is connected to \d+ peer ranks|preemption_notifier.cc")  # what jax itself writes


@pytest.fixture
def run(spawn, small, rows):
    """run(folder, processes, devices, mesh, ...) starts a run and gives its processes."""

    def begin(out: Path, processes: int, devices: int, mesh: tuple[int, int, int]) -> list[subprocess.Popen]:
        given = {
            "model.path": small,
            "data.train": rows,
            "data.eval": rows,
            "data.max_length": 64,
            "tuning.lora.rank": 4,
            "tuning.lora.dropout": 0.1,
            "optim.learning_rate": 0.01,
            "train.batch_size": 8,
            "train.max_steps": STEPS,
            "train.save_every": 5,
            "run.output_dir": out,
            "run.samples": 0,
            "run.resume": "true",
            "run.heartbeat_timeout": 20,
        }
        given |= dict(zip(("mesh.data", "mesh.fsdp", "mesh.tensor"), mesh, strict=True))
        if processes > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                address = f"127.0.0.1:{free.getsockname()[1]}"
            given |= {"run.distributed": "true", "run.coordinator_address": address, "run.num_processes": processes}
        args = [part for key, value in given.items() for part in (f"--{key}", str(value))]
        flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
        own = lambda index: ["--run.process_id", str(index)] if processes > 1 else []
        return [spawn("sft", *args, *own(index), environment={"XLA_FLAGS": flags}) for index in range(processes)]

    return begin


def after_some_steps(out: Path, processes: list[subprocess.Popen], who: int, what: signal.Signals) -> list[str]:
    """Sends a signal to one process when the run has learned something, and gives what all of them wrote."""
    metrics = out / "metrics.jsonl"
    count = lambda: metrics.read_text().count("tokens_per_second") if metrics.exists() else 0
    before, deadline = count(), time.monotonic() + 200
    while count() < before + 2 and all(one.poll() is None for one in processes) and time.monotonic() < deadline:
        time.sleep(0.01)
    processes[who].send_signal(what)
    return [one.communicate(timeout=200)[0] for one in processes]


def last_saved(out: Path) -> int:
    return max(int(folder.name) for folder in (out / "checkpoints").iterdir() if folder.name.isdigit())


@pytest.mark.parity  # a long one
@pytest.mark.timeout(1200)
def test_a_run_that_moves_between_one_process_and_two_is_the_run_that_stays(run, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "moves"
    [alone] = run(whole, 1, 8, (1, 2, 4))
    said, _ = alone.communicate(timeout=300)
    assert alone.returncode == 0, said

    # ---- two processes; the second one is told to end ---------------------------------------------------------------
    both = run(out, 2, 4, (1, 2, 4))
    first, second = after_some_steps(out, both, 1, signal.SIGTERM)
    assert [one.returncode for one in both] == [143, 143], first + second
    saved = last_saved(out)
    assert f"stopped by SIGTERM after step {saved}; go on with --run.resume true" in first
    assert 0 < saved < STEPS
    assert [line for line in second.splitlines() if line and not GLOO.search(line)] == []

    # ---- one process; an interrupt ----------------------------------------------------------------------------------
    [one] = run(out, 1, 8, (2, 2, 2))
    [text] = after_some_steps(out, [one], 0, signal.SIGINT)
    assert one.returncode == 130, text
    assert f"stopped by SIGINT after step {last_saved(out)}" in text
    assert saved < last_saved(out) < STEPS

    # ---- two again, on another mesh; one dies, and then the other ---------------------------------------------------
    for dies, code, words in (
        (1, 1, r"error: process 0 of 2 \(.*\) stops, since process 1 of 2 \(.*\) has not been heard of for \d+ s"),
        (
            0,
            -6,
            r"error: process 1 of 2 \(.*\) is gone without a word: .* lost the coordinator, process 0 at 127.0.0.1",
        ),
    ):
        both = run(out, 2, 4, (2, 4, 1))
        texts = after_some_steps(out, both, dies, signal.SIGKILL)
        assert both[1 - dies].returncode == code, texts[1 - dies]
        assert re.search(words, texts[1 - dies]), texts[1 - dies]
        assert "start all processes again, with --run.resume true" in texts[1 - dies]

    # ---- one, with half the devices, to the end ---------------------------------------------------------------------
    [one] = run(out, 1, 4, (1, 4, 1))
    text, _ = one.communicate(timeout=300)
    assert one.returncode == 0, text

    stayed, moved = (read_metrics(folder / "metrics.jsonl") for folder in (whole, out))
    assert [row["step"] for row in moved] == [row["step"] for row in stayed] == [0, *range(1, STEPS + 1), STEPS]
    for a, b in zip(stayed, moved, strict=True):
        assert a.get("trained_tokens") == b.get("trained_tokens")  # the same rows
        assert b.get("loss", b.get("eval_loss")) == pytest.approx(a.get("loss", a.get("eval_loss")), rel=5e-4)
    hub.load(str(out / "merged"))
    new, old = (load_file(folder / "merged" / "model.safetensors") for folder in (out, whole))
    for name, value in new.items():
        np.testing.assert_allclose(value, old[name], atol=2e-3, err_msg=name)
