"""What several processes are told and do, with real ones: two of four CPU devices each, over loopback."""

import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import pytest

from jaxsft import hosts, run

ROOT = Path(__file__).parents[1]
CPU = "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"


def free_address() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def start(code: str, *args: str) -> subprocess.Popen:
    own = {**os.environ, "XLA_FLAGS": CPU, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", textwrap.dedent(code), *args]
    return subprocess.Popen(command, env=own, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


PAIR = """
    import sys
    import jax
    import numpy as np
    from jax.experimental import multihost_utils
    from jaxsft import hosts, hub, report, run, sharding, train
    from jaxsft.data.stream import Batch
    from jaxsft.hub.files import Reader
    from jaxsft.types import Tokens

    folder, out, address, index = sys.argv[1:]
    counted, read = [0], Reader.read

    def count(self, name, index=()):
        counted[0] += (found := read(self, name, index)).nbytes
        return found

    def main():
        config = run.Config(out, distributed=True, coordinator_address=address, num_processes=2,
                            process_id=int(index), heartbeat_timeout=120)
        run.start(config)
        report.summary("seen", {"by": "process 0"})
        Reader.read = count
        mesh = sharding.mesh(1, 8, 1)
        hub.load(folder, mesh)
        print("read", counted[0])
        for shape in ((2, 4, 1), (1, 2, 4), (1, 1, 8)):
            mesh = sharding.mesh(*shape)
            process, processes = sharding.share(mesh)
            mine = np.split(np.arange(16).reshape(8, 2), processes)[process]
            [placed] = train.place([Batch(mine, 4, {})], mesh)
            print("rows", shape, processes, sharding.to_host(placed.batch).ravel().tolist(), placed.tokens)
        if int(index):
            raise run.RunError("the disk of this host is full")
        multihost_utils.process_allgather(np.ones(1))  # the other one never comes

    run.guard(main)
"""


def test_two_processes_read_their_own_and_one_that_ends_of_an_error_ends_the_other(tiny, tmp_path):
    folder, address = tiny("llama"), free_address()
    both = [start(PAIR, str(folder), str(tmp_path / "run"), address, str(index)) for index in range(2)]
    told = [process.communicate(timeout=200) for process in both]
    first, second = (out for out, _ in told)

    whole = (folder / "model.safetensors").stat().st_size
    for out in (first, second):
        read = int(re.search(r"read (\d+)", out)[1])  # type: ignore[index]
        assert 0.4 * whole < read < 0.55 * whole  # half of the kernels, and norms whole
        for shape, processes in (((2, 4, 1), 2), ((1, 2, 4), 2), ((1, 1, 8), 1)):
            assert f"rows {shape} {processes} {list(range(16))} {4 * processes}" in out
    assert ("process 0" in first, "process 0" in second) == (True, False)

    assert [process.returncode for process in both] == [1, 1]
    assert "error: the disk of this host is full" in told[1][1]
    assert re.search(
        r"error: process 0 of 2 .* stops, since process 1 of 2 .* ended with RunError: the disk", told[0][1]
    )
    assert "--run.resume true" in told[0][1]
    assert "without a word" not in "".join(err for _, err in told)


GONE = """
    import os, sys
    from jaxsft import hosts
    hosts.meet(sys.argv[1], 1, 0)
    print("here", flush=True)
    sys.stdin.read() if len(sys.argv) > 2 else None
"""


def test_a_process_that_is_ended_from_outside_has_last_words_and_one_that_is_done_has_none():
    killed = start(GONE, free_address(), "wait")
    assert killed.stdout
    assert killed.stdout.readline() == "here\n"
    killed.kill()
    _, words = killed.communicate(timeout=60)
    assert re.search(r"process 0 of 1 \(.*\) is gone without a word: it was killed, or it lost the coordinator", words)
    done = start(GONE, free_address())
    _, words = done.communicate(timeout=60)
    assert (done.returncode, "gone without a word" in words) == (0, False)


def test_a_coordinator_that_nobody_reaches_is_named_with_what_to_do():
    address = free_address()
    with pytest.raises(hosts.HostsError, match=rf"nobody listens at {address}.* for 0 s .*run.coordinator_address and"):
        hosts.meet(address, 2, 1, start_timeout=0)
    with pytest.raises(hosts.HostsError, match=r"run.coordinator_address is 'host'; it must be HOST:PORT"):
        hosts.meet("host", 2, 1)


def test_a_port_that_another_run_listens_at_is_refused():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        address = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(hosts.HostsError, match=rf"process 0 cannot listen at {address} .*choose another port"):
            hosts.meet(address, 2, 0)


def test_what_does_not_say_who_the_processes_are_is_refused(tmp_path, monkeypatch):
    def initialize(*_, **__):
        raise ValueError("Number of processes must be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(
        hosts.HostsError, match=r"num_processes None, process_id 0\): Number of.* give all three: --run"
    ):
        hosts.meet(free_address(), None, 0)
    with pytest.raises(run.RunError, match=r"process_id are for --run.distributed true; add it"):
        run.start(run.Config(str(tmp_path / "a"), num_processes=2))


def test_a_flag_wins_over_the_environment(monkeypatch):
    given = []
    first, second = free_address(), free_address()
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", first)
    monkeypatch.setenv("JAX_NUM_PROCESSES", "4")
    monkeypatch.setenv("JAX_PROCESS_ID", "0")

    def initialize(*args, **_):
        given.append(args)
        raise RuntimeError("enough")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    for flags in ((), (second, 2)):
        with pytest.raises(hosts.HostsError, match="enough"):
            hosts.meet(*flags)
    assert given == [(first, 4, 0), (second, 2, 0)]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_is_told_at_the_next_step_and_the_handlers_come_back(name, capfd):
    number, before = signal.Signals[name], [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    with hosts.notice() as told:
        assert told(1) is None
        signal.raise_signal(number)
        assert signal.getsignal(number) == signal.SIG_DFL  # a second one ends the process
        assert told(2) == name
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before
    assert f"{name}: the run stops after this step" in capfd.readouterr().err


def test_a_run_that_was_told_to_end_exits_as_its_signal_says(capsys):
    for name, code in (("SIGTERM", 143), ("SIGINT", 130)):

        def main(name=name):
            raise hosts.Stopped(name, 37)

        with pytest.raises(SystemExit) as stopped:
            run.guard(main)
        assert stopped.value.code == code
        assert capsys.readouterr().out == f"\nstopped by {name} after step 37; go on with --run.resume true\n"
