"""From images to batches: in the order and with the positions of `data.stream`, decoded beside the training.

The order is one of numbers; a batch of numbers becomes a batch of pixels a few batches ahead of its turn. How many
workers there are is no part of a position, so a run may go on with more or fewer of them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int

from jaxsft.data.images.pool import Pool, opened, prepare
from jaxsft.data.images.sources import Picture
from jaxsft.data.stream import Batch, iterate, ordered, share
from jaxsft.types import Images

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class ImageRows:
    """Images with their classes, decoded when asked for."""

    pictures: Sequence[Picture]
    labels: Int[np.ndarray, "N"]
    pool: Pool
    digest: str  # of what they show, their classes, and how they are brought to size

    def __len__(self) -> int:
        return len(self.pictures)

    @property
    def size(self) -> tuple[int, int, int]:
        """Height, width and channels of what the model sees."""
        return (*self.pool.how.preprocess.shape, 3)

    def picture(self, number: int) -> "Image":
        """A picture in its own size."""
        return opened(self.pictures[number], self.pool.how)

    def some(self, count: int) -> "ImageRows":
        """At most `count` of them, spread evenly over their order."""
        if count >= len(self):
            return self
        kept = np.unique(np.linspace(0, len(self) - 1, count).round().astype(int))
        return ImageRows([self.pictures[i] for i in kept], self.labels[kept], self.pool, f"{self.digest}-{count}")


def batches(
    rows: ImageRows,
    batch_size: int,
    *,
    seed: int | None,
    epochs: int | None,
    position: dict[str, Any] | None = None,
    process: int = 0,
    processes: int = 1,
) -> Iterator[Batch]:
    """Batches of images, in a new order every epoch, from any position on; arguments as for `data.batches`.

    Raises:
      DataError: as there; an image cannot be decoded, or a process that decodes was killed.
    """
    local = share(batch_size, processes)
    numbers = range(len(rows))
    data = ordered(numbers, -1, batch_size, seed=seed, epochs=epochs, process=process, processes=processes)
    found = iterate(data, rows.digest, position, lambda some: int((some >= 0).sum()))
    chosen = ((batch, [rows.pictures[i] for i in batch.tokens if i >= 0]) for batch in found)
    for batch, parts in rows.pool.map(prepare, chosen):
        turn = (int(batch.position["next_index"] - 1) * processes + process) * local
        yield batch._replace(tokens=_images(np.asarray(batch.tokens, np.int32), parts, rows, turn))


def _images(numbers: Int[np.ndarray, "B"], parts: Sequence[np.ndarray], rows: ImageRows, turn: int) -> Images:
    """Pixels of the numbers that are images, black for those that fill up a batch."""
    real = np.concatenate(parts) if parts else np.zeros((0, *rows.size), np.uint8)
    pixels = np.zeros((len(numbers), *real.shape[1:]), np.uint8)
    pixels[numbers >= 0] = real
    label = np.where(numbers >= 0, rows.labels[numbers], 0)
    column = lambda values, kind: np.asarray(values)[:, None].astype(kind)
    turns = turn + np.arange(len(numbers))
    return Images(pixels, column(label, np.int32), column(numbers, np.int32), column(turns, np.uint32))  # type: ignore
