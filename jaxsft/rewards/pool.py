"""Calls of other people's code in processes that can be killed.

A process is a fresh interpreter, never a fork, which would copy the locks of jax's threads, and it does not import the
script that runs. It is sent many calls at a time and answers them one by one; one that gives no answer in time is
killed, and a new one goes on behind the call that it hung in.
"""

import json
import os
import signal
import subprocess
import sys
import time
import weakref
from collections import Counter, deque
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing import Pipe, connection
from typing import Any, NamedTuple

from jaxsft.rewards.named import Manner, RewardError
from jaxsft.rewards.worker import Outcome

IMPORT = 300.0  # seconds that importing the functions may take
STRIKES = 3  # calls of one function that may take their process with them, or a twentieth of all if that is more
MESSAGES = 4  # a process, in one go: so that none waits long for the last one


class Call(NamedTuple):
    """One call of the function with this number."""

    function: int
    positional: list[Any]
    keywords: dict[str, Any]


class Worker(NamedTuple):
    """A process and the connection to it."""

    process: subprocess.Popen
    link: connection.Connection


class Job(NamedTuple):
    """What a process is at: numbers of calls, and when the first of them is to be done."""

    numbers: deque[int]
    deadline: float


class Round(NamedTuple):
    """Where calls are at."""

    calls: Sequence[Call]
    outcomes: list[Outcome]  # in the same order; {} until it is known
    waiting: deque[int]  # numbers of calls
    busy: dict[int, Job]  # by place in `Pool.workers`
    strikes: Counter[int]  # calls that took their process with them, by function
    limits: dict[int, int]  # of strikes: behind them a function is not called again in this round


class Pool:
    """Processes that have imported some functions.

    Args:
      functions: (name, arguments) of each, see `named.find`.
      timeout: seconds that a call may take.
      workers: processes.

    Raises:
      RewardError: a function cannot be found, or its module cannot be imported.
    """

    def __init__(self, functions: Sequence[tuple[str, dict[str, Any]]], *, timeout: float, workers: int):
        self.functions, self.timeout = functions, timeout
        self.workers: list[Worker | None] = [None] * workers
        self.close = weakref.finalize(self, _end, self.workers)  # when nobody needs it any more, or at exit
        try:
            for place in range(workers):  # they import at the same time
                self.workers[place] = _start(functions)
            manners = [_manners(worker) for worker in self.workers if worker]
            self.manners = manners[0]
        except BaseException:
            self.close()
            raise

    def run(self, calls: Sequence[Call]) -> list[Outcome]:
        """Makes calls, and gives the outcome of each: what it returned, or {"error": why it did not}."""
        limits = {function: max(STRIKES, n // 20) for function, n in Counter(call.function for call in calls).items()}
        state = Round(calls, [{}] * len(calls), deque(range(len(calls))), {}, Counter(), limits)
        size = max(1, -(-len(calls) // (MESSAGES * len(self.workers))))
        try:
            while state.waiting or state.busy:
                for place in range(len(self.workers)):
                    if state.waiting and place not in state.busy:
                        self._give(place, _next(state, size), state)
                if state.busy:
                    self._take(state)
        except BaseException:
            for place in state.busy:
                self._kill(place)
            raise
        return state.outcomes

    def _give(self, place: int, numbers: deque[int], state: Round) -> None:
        """Sends calls to an idle process."""
        try:
            worker = self.workers[place]
            if worker is None:
                self.workers[place] = worker = _start(self.functions)
                _manners(worker)
        except RewardError as error:  # it could be imported before
            self._kill(place)
            for number in numbers:
                state.outcomes[number] = {"error": str(error)}
            return
        if numbers:
            with suppress(OSError):  # a process that has died tells so when it is listened to
                worker.link.send_bytes(json.dumps([state.calls[n] for n in numbers], default=str).encode())
            state.busy[place] = Job(numbers, time.monotonic() + self.timeout)

    def _take(self, state: Round) -> None:
        """Waits for the next outcomes, or for the first process that is late."""
        links = {worker.link: place for place, worker in enumerate(self.workers) if worker and place in state.busy}
        left = min(job.deadline for job in state.busy.values()) - time.monotonic()
        ready = connection.wait(list(links), max(left, 0.0))
        for link, place in links.items():
            job = state.busy[place]
            if link in ready:
                try:
                    state.outcomes[job.numbers[0]] = json.loads(link.recv_bytes())
                except (EOFError, OSError):
                    self._lose(place, f"its process ended with {_status(self._kill(place, patience=1.0))}", state)
                    continue
                job.numbers.popleft()
                if job.numbers:
                    state.busy[place] = job._replace(deadline=time.monotonic() + self.timeout)
                else:
                    del state.busy[place]
            elif time.monotonic() > job.deadline:
                self._kill(place)
                why = f"it took more than {self.timeout:g} seconds; raise reward.timeout if it needs them"
                self._lose(place, why, state)

    def _lose(self, place: int, why: str, state: Round) -> None:
        """Notes that a process is gone, with the call that it was at; the calls behind that one wait again."""
        number, *rest = state.busy.pop(place).numbers
        state.outcomes[number] = {"error": why}
        state.strikes[state.calls[number].function] += 1
        state.waiting.extendleft(reversed(rest))

    def _kill(self, place: int, patience: float = 0.0) -> int | None:
        worker, self.workers[place] = self.workers[place], None
        return _kill(worker, patience) if worker else None


def _next(state: Round, size: int) -> deque[int]:
    """Takes the next calls that wait; what has taken too many processes with it is not called again."""
    numbers = deque()
    while state.waiting and len(numbers) < size:
        number = state.waiting.popleft()
        function = state.calls[number].function
        if state.strikes[function] < state.limits[function]:
            numbers.append(number)
        else:
            why = f"it was not called: {state.limits[function]} calls before this one took their process with them"
            state.outcomes[number] = {"error": why}
    return numbers


def _start(functions: Sequence[tuple[str, dict[str, Any]]]) -> Worker:
    """Starts a process and tells it what to import, without waiting for it."""
    ours, theirs = Pipe()
    here = os.getcwd()
    path = [folder or here for folder in sys.path]
    path += [here] * (here not in path)
    code = f"import sys; sys.path[:] = {path!r}; from jaxsft.rewards.worker import main; main({theirs.fileno()})"
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.DEVNULL,
        pass_fds=[theirs.fileno()],
        start_new_session=True,  # Ctrl-C is for us, who then end it; and what it starts can be killed with it
        env={**os.environ, "JAX_PLATFORMS": "cpu"},  # functions that use jax do not take memory of the accelerators
    )
    theirs.close()
    with suppress(OSError):
        ours.send_bytes(json.dumps(list(functions)).encode())
    return Worker(process, ours)


def _manners(worker: Worker) -> list[Manner]:
    """Waits until a process has imported the functions; how each of them is called."""
    if not worker.link.poll(IMPORT):
        raise RewardError(f"importing the reward functions took more than {IMPORT:g} seconds")
    try:
        reply = json.loads(worker.link.recv_bytes())
    except (EOFError, OSError):
        worker.process.wait()
        status = _status(worker.process.returncode)
        raise RewardError(f"the process that imports the reward functions ended with {status}") from None
    if "error" in reply:
        raise RewardError(reply["error"])
    return [Manner(**one) for one in reply]


def _status(code: int | None) -> str:
    """What a process ended with, in words.

    Example:
      >>> _status(-9), _status(1)
      ('signal SIGKILL (for want of memory, most often)', 'status 1')
    """
    if code is None or code >= 0:
        return f"status {code}"
    return f"signal {signal.Signals(-code).name}" + " (for want of memory, most often)" * (code == -signal.SIGKILL)


def _kill(worker: Worker, patience: float) -> int | None:
    """Ends a process and all that it started, after so many seconds to end by itself; what it ended with."""
    with suppress(subprocess.TimeoutExpired):
        worker.process.wait(patience)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(worker.process.pid, signal.SIGKILL)
    worker.link.close()
    return worker.process.wait()


def _end(workers: list[Worker | None]) -> None:
    """Ends processes: idle ones by themselves, others at once."""
    left = [worker for worker in workers if worker]
    workers[:] = [None] * len(workers)
    for worker in left:
        worker.link.close()
    for worker in left:
        _kill(worker, patience=0.5)
