"""Pictures decoded beside the training, in threads of this process or in processes of their own.

Pillow lets other threads run while it decodes and resizes, so threads do until Python itself is in the way; processes
cost two seconds at the start. Which of them, and how many, changes nothing that comes out. What goes wrong in one comes
back with the picture's place; one that was killed ends the run.
"""

import hashlib
import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
from jaxtyping import UInt8

from jaxsft.data import pixels
from jaxsft.data.images.decode import MAX_PIXELS, decode, size
from jaxsft.data.images.sources import Picture, content
from jaxsft.data.rows import Bad, DataError

if TYPE_CHECKING:
    from PIL.Image import Image

T = TypeVar("T")
THREADS = 4  # at most, where there are no processes


class How(NamedTuple):
    """What is done to every picture."""

    preprocess: pixels.Preprocess
    max_pixels: int = MAX_PIXELS
    tables: Sequence[Any] = ()  # that pictures lie in


class Look(NamedTuple):
    """What a look at a picture says of it."""

    hash: int  # of what it shows, or of its file
    bad: Bad | None = None


def prepare(pictures: Sequence[Picture], how: How) -> UInt8[np.ndarray, "B H W C"]:
    """Decodes pictures, and brings them to the size that the model sees.

    Raises:
      DataError: one cannot be decoded; the message begins with its place.
    """
    return np.stack([pixels.apply(how.preprocess, opened(one, how)) for one in pictures])


def opened(picture: Picture, how: How) -> "Image":
    """Decodes a picture.

    Raises:
      DataError: it cannot be; the message begins with its place.
    """
    try:
        return decode(content(picture, list(how.tables)), how.max_pixels)
    except DataError as error:
        raise DataError(f"{picture.place}: {error}") from error


def look_at_pixels(pictures: Sequence[Picture], how: How) -> list[Look]:
    """Decodes pictures to see whether that works, and what they show."""

    def one(picture: Picture) -> Look:
        image = decode(content(picture, list(how.tables)), how.max_pixels)
        return _look(np.asarray(image).tobytes(), image.size)

    return [_tried(one, picture) for picture in pictures]


def look_at_bytes(pictures: Sequence[Picture], how: How) -> list[Look]:
    """Reads files and their headers, and decodes nothing."""

    def one(picture: Picture) -> Look:
        found = content(picture, list(how.tables))
        size(found, how.max_pixels)
        if isinstance(found, str):
            with open(found, "rb") as file:
                found = file.read()
        return _look(found, (0, 0))

    return [_tried(one, picture) for picture in pictures]


def _look(content: bytes, size: tuple[int, int]) -> Look:
    hasher = hashlib.blake2b(np.array(size, np.int64).tobytes(), digest_size=8)
    hasher.update(content)
    return Look(int.from_bytes(hasher.digest(), "little"))


def _tried(look: Callable[[Picture], Look], picture: Picture) -> Look:
    try:
        return look(picture)
    except DataError as error:
        return Look(0, Bad(picture.place, str(error)))


class Pool:
    """Threads or processes that work on pictures; they start with the first work, and `close` ends them.

    Args:
      how: what is done.
      workers: processes; 0 for threads of this one.
    """

    def __init__(self, how: How, workers: int = 0):
        if workers < 0:
            raise DataError(f"data.workers is {workers}; it must be 0, for threads, or a number of processes")
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.how, self.workers, self.width = how, workers, workers or min(THREADS, cores)
        self._executor: Executor | None = None

    def map(
        self,
        work: Callable[[Sequence[Picture], How], Any],
        batches: Iterable[tuple[T, Sequence[Picture]]],
        depth: int = 2,
    ) -> Iterator[tuple[T, list[Any]]]:
        """Works on batches in order, a few ahead of the one that is given out.

        Args:
          work: (some pictures, how) -> what becomes of them; a function of a module, so that a process finds it.
          batches: (what the caller wants back, pictures).
          depth: batches that are worked on ahead.

        Yields:
          (what the caller wanted back, the parts that its pictures became, in order).

        Raises:
          DataError: of `work`; a process has died.
        """
        waiting: deque[tuple[T, list[Future]]] = deque()
        try:
            for mark, pictures in batches:
                part = max(1, -(-len(pictures) // self.width))
                cut = [pictures[i : i + part] for i in range(0, len(pictures), part)]
                waiting.append((mark, [self._submit(work, some) for some in cut]))
                if len(waiting) > depth:
                    yield _done(waiting.popleft())
            while waiting:
                yield _done(waiting.popleft())
        except BrokenProcessPool as error:
            self.close()
            raise DataError(
                f"one of {self.workers} processes that decode images was killed, for want of memory most often; take "
                "fewer with data.workers. A script of your own must call this under `if __name__ == "
                '"__main__":`, since processes import it'
            ) from error
        finally:
            for _, parts in waiting:
                for one in parts:
                    one.cancel()

    def _submit(self, work: Callable, pictures: Sequence[Picture]) -> Future:
        if self._executor is None:
            # Spawned, since jax runs threads, which a fork would leave behind holding locks.
            context = multiprocessing.get_context("spawn")
            self._executor = (
                ProcessPoolExecutor(self.workers, context, _start_worker, (self.how,))
                if self.workers
                else ThreadPoolExecutor(self.width, "decode")
            )
        if self.workers:
            return self._executor.submit(_work, work, pictures)
        return self._executor.submit(work, pictures, self.how)

    def close(self) -> None:
        """Ends threads and processes; the next work starts new ones."""
        if self._executor is not None:
            self._executor.shutdown(wait=True, cancel_futures=True)
            self._executor = None


def _done(waiting: tuple[T, list[Future]]) -> tuple[T, list[Any]]:
    mark, parts = waiting
    return mark, [one.result() for one in parts]


_HOW: list[How] = []  # of a worker process, set once


def _start_worker(how: How) -> None:
    _HOW[:] = [how]


def _work(work: Callable, pictures: Sequence[Picture]) -> Any:
    return work(pictures, *_HOW)
