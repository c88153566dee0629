"""Several processes as one run: how they meet, stop together, and end when one of them is gone.

jax.distributed introduces the processes to each other through a coordinator in process 0. Two things it leaves open are
done here. A collective waits for ever for a process that died, and what ends the wait is an abort deep in C++, long
after and without a word of what to do: so each process tells the coordinator every second that it lives, process 0
names the one that fell silent, and all others end with that. And where jax itself aborts, since process 0 is gone, a
child process that has nothing else to do writes the last words.
"""

import atexit
import contextlib
import itertools
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jax
from jax._src import distributed  # its client has no public name
from jax.experimental import multihost_utils

VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
ALIVE, ENDED = "jaxsft/alive/", "jaxsft/ended"  # keys that the coordinator keeps
BEAT = 1.0  # seconds between signs of life
DOUBTED = 10.0  # seconds without a sign of life that are enough when an exchange has failed
DAY = 24 * 3600  # seconds; far more than any process writes at the end of a run
LATER = 30  # seconds by which jax's own abort comes after ours
GO_ON = "start all processes again, with --run.resume true to go on from the last checkpoint"
# Ends when the pipe to it closes, which the kernel does however its parent ends; then it says what it was told last.
LAST_WORDS = "import sys; said = sys.stdin.read().split('\\0')[-2]; print(said, end='', file=sys.stderr)"


class HostsError(ValueError):
    """Processes that do not come together; the message says why and what to do."""


class Stopped(Exception):  # noqa: N818  no error: what was asked for
    """A run that was told to end and did, with all that is needed to go on.

    Args:
      name: of the signal.
      step: after which it ended.
      unit: what was counted.
    """

    def __init__(self, name: str, step: int, unit: str = "step"):
        super().__init__(f"stopped by {name} after {unit} {step}; go on with --run.resume true")
        self.code = 128 + signal.Signals[name].value  # as shells and launchers count


class _Watch(threading.Thread):
    """Says every second that this process lives, and ends it when another one does not."""

    def __init__(self, timeout: float, last_words: subprocess.Popen):
        super().__init__(name="jaxsft.hosts", daemon=True)
        self.timeout, self.last_words, self.leaving = timeout, last_words, threading.Event()
        self.doubt = ""  # "?" when an exchange has failed: most likely some process is gone
        self.client: Any = distributed.global_state.client
        self.index, self.count = distributed.global_state.process_id, distributed.global_state.num_processes
        self.name_here = f"process {self.index} of {self.count} ({socket.gethostname()})"

    def run(self) -> None:
        heard: dict[str, tuple[str, float]] = {}  # process -> its last sign of life, and when that was new
        for beat in itertools.count():
            if self.leaving.is_set():
                return
            try:
                self.client.key_value_set(
                    f"{ALIVE}{self.index}", f"{beat}{self.doubt} {self.name_here}", allow_overwrite=True
                )
                if self.index == 0 and (silent := self._silent(heard)):
                    self.publish(f"{silent} has not been heard of for {self.timeout:.0f} s: it died, or its host did")
                news = self.client.blocking_key_value_get(ENDED, int(BEAT * 1000))
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    return  # the coordinator is gone: jax ends this process, and the last words follow
                continue
            if not self.leaving.wait(BEAT):  # time for an error that all processes met to be told by each
                self.end(f"\nerror: {self.name_here} stops, since {news}. Look at what that one wrote, then {GO_ON}\n")

    def _silent(self, heard: dict[str, tuple[str, float]]) -> str | None:
        """Names a process that was not heard of for too long."""
        now = time.monotonic()
        for key, said in self.client.key_value_dir_get(ALIVE):
            before, since = heard.get(key, ("", now))
            heard[key] = said, since if said == before else now
            if "?" in said:
                self.timeout = min(self.timeout, DOUBTED)
            if now - heard[key][1] > self.timeout:
                self.client.key_value_delete(key)  # nobody waits for it
                return said.split(" ", 1)[1]
        return None

    def publish(self, news: str) -> None:
        """Tells all processes why they have to end; what was told first counts."""
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self.client.key_value_set(ENDED, news)

    def end(self, words: str = "") -> NoReturn:
        """Ends the process without waiting for the others, as an orderly end would; process 0 lets them go first."""
        os.write(2, words.encode())
        sys.stdout.flush()
        dismiss(self.last_words)
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self.client.key_value_delete(f"{ALIVE}{self.index}")
            deadline = time.monotonic() + 10 * BEAT
            while self.index == 0 and self.client.key_value_dir_get(ALIVE) and time.monotonic() < deadline:
                time.sleep(0.1)
        os._exit(1)

    def fail(self, error: BaseException) -> NoReturn:
        """Ends this process of an error, and tells the others; or of what another one met, if that is behind it."""
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            self.doubt = "?"
            self.leaving.wait(DOUBTED + 5 * BEAT)  # `run` may end the process meanwhile, with the name of that one
        self.leaving.set()
        reason = " ".join(str(error).split())[:500]
        self.publish(f"{self.name_here} ended with {type(error).__name__}: {reason}")
        self.join()
        self.end()

    def leave(self) -> None:
        """An orderly end, all together: until then the others may be writing, and are watched."""
        self.client.wait_at_barrier("jaxsft/leave", DAY * 1000)
        self.leaving.set()
        self.join()
        dismiss(self.last_words)


def say_last(words: subprocess.Popen, text: str) -> None:
    """Sets what is written when this process is gone."""
    assert words.stdin
    words.stdin.write(f"{text}\0")
    words.stdin.flush()


def dismiss(words: subprocess.Popen) -> None:
    """Leaves no last words."""
    words.communicate("\0")


_watch: list[_Watch] = []  # one, in a process that has met others


def meet(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    start_timeout: int = 300,
    heartbeat_timeout: int = 60,
) -> None:
    """Makes this process one of several; what is not given comes from the environment, or from TPU pod, Slurm or MPI.

    Args:
      coordinator_address: host:port of process 0, the same for all.
      num_processes: how many there are.
      process_id: which one this is, from 0.
      start_timeout: seconds until all must be there.
      heartbeat_timeout: seconds without a sign of life after which a process counts as dead and the others end.

    Raises:
      HostsError: nothing says who the processes are, or not all of it; the coordinator cannot be reached.
    """
    if _watch:
        return
    given = [coordinator_address, num_processes, process_id]
    address, *numbers = (os.environ.get(v) if x is None else x for v, x in zip(VARIABLES, given, strict=True))
    count, index = (None if x is None else int(x) for x in numbers)
    if index == 0 and address:
        _claim(*_parts(address))
    elif address and index:
        _reach(*_parts(address), start_timeout)
    last_words = subprocess.Popen(
        [sys.executable, "-S", "-c", LAST_WORDS], stdin=subprocess.PIPE, text=True, start_new_session=True
    )
    here = f"process {'?' if index is None else index} of {count or '?'} ({socket.gethostname()})"
    where = f"the coordinator, process 0 at {address or 'the address above'}"
    say_last(
        last_words,
        f"\nerror: {here} gave up: not all processes came to {where}, within run.start_timeout, {start_timeout} s. "
        "Look at the ones that did not start; num_processes must be the same for all\n",
    )
    try:
        jax.distributed.initialize(
            address,
            count,
            index,
            initialization_timeout=start_timeout,
            heartbeat_timeout_seconds=heartbeat_timeout + LATER,
        )
    except (ValueError, RuntimeError) as error:
        dismiss(last_words)
        known = f"coordinator_address {address}, num_processes {count}, process_id {index}"
        raise HostsError(
            f"run.distributed is true, and the processes cannot meet ({known}): {error}. Off TPU pods, Slurm and Open "
            f"MPI give all three: --run.coordinator_address HOST:PORT --run.num_processes N --run.process_id I, or "
            f"{', '.join(VARIABLES)}"
        ) from error
    watch = _Watch(heartbeat_timeout, last_words)
    say_last(
        last_words,
        f"\nerror: {watch.name_here} is gone without a word: it was killed, or it lost {where}. Look at the lines "
        f"above and at what process 0 wrote, then {GO_ON}\n",
    )
    _watch.append(watch)
    watch.start()
    atexit.register(_leave)  # before jax's own, which was registered earlier


def _parts(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise HostsError(f"run.coordinator_address is {address!r}; it must be HOST:PORT of process 0")
    return host.strip("[]"), int(port)


def _claim(host: str, port: int) -> None:
    """Refuses a port where another run's process 0 listens: jax would share it, and end that run."""
    with socket.socket() as found:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            found.bind(("", port))
        except OSError as error:
            raise HostsError(
                f"process 0 cannot listen at {host}:{port} ({error}); choose another port in run.coordinator_address, "
                "and give each process a run.process_id of its own"
            ) from error


def _reach(host: str, port: int, timeout: float) -> None:
    """Waits until somebody listens: jax would abort the process if nobody does."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection((host, port), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise HostsError(
                    f"nobody listens at {host}:{port}, where process 0 should, for {timeout:.0f} s ({error}); "
                    "start it, check run.coordinator_address and the firewall, or raise run.start_timeout"
                ) from error
            time.sleep(0.5)


def _leave() -> None:
    """Ends what `meet` began, at the end of the process."""
    if error := getattr(sys, "last_value", None):  # a traceback was printed
        fail(error)
    if _watch:
        _watch.pop().leave()


def several() -> bool:
    """Has this process met others?"""
    return bool(_watch)


def fail(error: BaseException) -> None:
    """Ends this process and the others of an error that was written; where there are no others it does nothing."""
    if _watch:
        _watch[0].fail(error)


@contextlib.contextmanager
def notice() -> Iterator[Callable[[int], str | None]]:
    """Within it SIGTERM and SIGINT do not end the process: they are told after the step that is being done.

    A second signal ends the process at once. On several hosts one that any of them gets counts for all, and a notice
    that a TPU is to be preempted is a SIGTERM; jax has them agree on a step without an exchange at each.

    Yields:
      told(step) -> the name of the signal after which to stop now, or None; to be asked after every step.

    Example:
      >>> with notice() as told:
      ...     before = told(1)
      ...     signal.raise_signal(signal.SIGTERM)
      ...     before, told(2)
      (None, 'SIGTERM')
    """
    caught: list[str] = []
    together = jax.distributed.is_initialized()

    def catch(number: int, _frame: Any) -> None:
        signal.signal(number, signal.SIG_DFL)
        name = signal.Signals(number).name
        os.write(2, f"\n{name}: the run stops after this step; once more ends it at once\n".encode())
        caught.append(name)
        if together:
            signal.raise_signal(signal.SIGTERM)  # jax has taken that one, and tells the others

    def told(step: int) -> str | None:
        if together:
            return "SIGTERM" if multihost_utils.reached_preemption_sync_point(step) else None
        return caught[0] if caught else None

    ours = [signal.SIGINT] if together else [signal.SIGINT, signal.SIGTERM]
    if threading.current_thread() is not threading.main_thread():
        ours = []  # Python takes signals in the main thread alone
    before = {number: signal.signal(number, catch) for number in ours}
    try:
        yield told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
