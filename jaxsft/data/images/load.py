"""From a configuration to images with classes: found, looked at, split; and a report of what became of them."""

import hashlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int, UInt64

from jaxsft.data import pixels
from jaxsft.data.images.decode import MAX_PIXELS, MOST
from jaxsft.data.images.labels import balanced, choose
from jaxsft.data.images.pool import How, Look, Pool, look_at_bytes, look_at_pixels
from jaxsft.data.images.sources import Found, Picture, find
from jaxsft.data.images.split import copies, stratified
from jaxsft.data.images.stream import ImageRows
from jaxsft.data.rows import Bad, DataError
from jaxsft.data.tokenise import LISTED, refuse

SOME = 64  # pictures that are looked at before the line for people moves


@dataclass(frozen=True)
class Config:
    """Which images to learn from."""

    train: str | list[str] = ""
    """files of rows {"image_path": ..., "label": ...} (jsonl, json, csv), a folder with a folder for each class, a set
    with a column of images (org/name:split, a folder of datasets.save_to_disk, parquet, arrow); or a list of these"""
    eval: str | list[str] | None = None
    """held-out images of the same kind"""
    val_fraction: float = 0.0
    """hold out this share of each class of train instead; copies of an image stay on one side"""
    columns: dict[str, str] | None = None
    """names of columns, ours: theirs, such as {image_path: file_name, label: fine_label}"""
    class_weights: Literal["none", "balanced"] = "none"
    """balanced: each class weighs as much as another in the training loss, however many images it has"""
    on_bad_row: Literal["error", "skip"] = "error"
    """an image that cannot be used ends the run, after 20 of them were listed; or it is left out and counted"""
    check: Literal["pixels", "bytes"] = "pixels"
    """before training, decode every image once, to find broken ones, and copies whatever they are saved as; or read the
    files alone, which is faster, finds copies of files, and leaves a broken image to end the run when its turn comes"""
    image_size: int | None = None
    """pixels of a side of what the model sees; by default what its preprocessor_config.json says. Other positions than
    those that it learned are interpolated"""
    max_pixels: int = MAX_PIXELS
    """the most pixels of an image, width times height; its header tells before it is decoded"""
    seed: int = 0
    """of what is held out"""
    workers: int = 0
    """processes that decode; 0: a few threads of this one"""


class Report(NamedTuple):
    """What became of the images."""

    images: int  # to learn
    held_out: int
    classes: tuple[str, ...]
    counts: list[int]  # images of each class to learn
    dropped: int
    bad: list[str]  # the first of those dropped
    copies: int  # images that are equal to an earlier one, on either side
    crossing: int  # held-out images of data.eval that are in data.train, too
    contradicting: int  # different images that have copies in several classes
    lone: list[str]  # classes that nothing can be held out of

    def lines(self) -> list[tuple[str, str]]:
        """Names and values for people.

        Example:
          >>> Report(9, 0, ("cat", "dog"), [7, 2], 0, [], 0, 0, 0, []).lines()[1]
          ('classes', '2, of 2 (dog) to 7 (cat) images')
        """
        fewest, most = np.argmin(self.counts), np.argmax(self.counts)
        name = lambda i: f"{self.counts[i]:,} ({self.classes[i]})"
        extremes = f"{name(fewest)} to {name(most)} images"
        if self.counts[fewest] == self.counts[most]:
            extremes = f"{self.counts[most]:,} images each"
        shown = {
            "images": f"{self.images:,}",
            "classes": f"{len(self.classes)}, of {extremes}",
            "held out": f"{self.held_out:,} images" if self.held_out else "none",
            "dropped": f"{self.dropped:,}" + "".join(f"\n{line}" for line in self.bad),
            "copies": f"{self.copies:,}",
        }
        if self.crossing:
            shown["learned and measured"] = f"{self.crossing:,} images of data.eval are in data.train, too"
        if self.contradicting:
            shown["contradicting"] = f"{self.contradicting:,} images have copies in another class"
        if self.lone:
            shown["nothing held out of"] = ", ".join(self.lone[:10]) + ", which have one image" * (len(self.lone) > 0)
        return list(shown.items())


class Loaded(NamedTuple):
    """Images to learn, images to measure on, the classes, and what became of the data."""

    train: ImageRows
    eval: ImageRows | None
    classes: tuple[str, ...]
    weights: Float[np.ndarray, "C"] | None  # of the classes
    report: Report


class Seen(NamedTuple):
    """Pictures that can be used, and what they show."""

    pictures: list[Picture]
    hashes: UInt64[np.ndarray, "N"]
    bad: list[Bad]
    pool: Pool


def load(
    config: Config,
    preprocess: pixels.Preprocess,
    *,
    known: Sequence[str] = (),
    classes: Sequence[str] | None = None,
) -> Loaded:
    """Finds the images of a run, looks at each, and chooses what is held out.

    Args:
      config: which, and what of them.
      preprocess: how the model wants to see them.
      known: classes of the checkpoint, whose order stands if the data have the same; see `labels.choose`.
      classes: of a run that continues, which are settled.

    Raises:
      DataError: images cannot be used, a label is none of the classes; the message names their places.
    """
    if not config.train:
        raise DataError('data.train is empty; give a folder of classes, or rows {"image_path": ..., "label": ...}')
    if config.eval and config.val_fraction:
        raise DataError("data.eval and data.val_fraction are both given; choose one")
    if not 0 < config.max_pixels <= MOST:
        raise DataError(f"data.max_pixels is {config.max_pixels:,}; it must be at least 1 and at most {MOST:,}")
    preprocess = sized(config, preprocess)
    seen = look(config, config.train, preprocess)
    classes = tuple(classes) if classes else choose((one.label for one in seen.pictures), known)
    labels = numbered(seen.pictures, classes)
    held, lone, apart = np.zeros(len(labels), bool), [], None
    if config.eval:
        apart = look(config, config.eval, preprocess)
    elif config.val_fraction:
        held, alone = stratified(labels, seen.hashes, config.val_fraction, config.seed)
        lone = [classes[number] for number in alone]
    train = _rows(seen, labels, ~held)
    measured = train
    if apart:
        measured = _rows(apart, numbered(apart.pictures, classes), np.ones(len(apart.pictures), bool))
    elif config.val_fraction:
        measured = _rows(seen, labels, held)
    hashes = np.concatenate([seen.hashes, *([apart.hashes] if apart else [])])
    bad = [*seen.bad, *(apart.bad if apart else [])]
    report = Report(
        images=len(train),
        held_out=0 if measured is train else len(measured),
        classes=classes,
        counts=np.bincount(train.labels, minlength=len(classes)).tolist(),
        dropped=len(bad),
        bad=[str(one) for one in bad[:LISTED]],
        copies=copies(hashes),
        crossing=int(np.isin(apart.hashes, seen.hashes).sum()) if apart else 0,
        contradicting=_contradicting(seen.hashes, labels),
        lone=lone,
    )
    weights = balanced(train.labels, len(classes)) if config.class_weights == "balanced" else None
    return Loaded(train, None if measured is train else measured, classes, weights, report)


def sized(config: Config, preprocess: pixels.Preprocess) -> pixels.Preprocess:
    """What is done to an image, for the size that the run wants.

    Example:
      >>> sized(Config(image_size=64), pixels.Preprocess()).shape
      (64, 64)
    """
    return pixels.at(preprocess, config.image_size) if config.image_size else preprocess


def classes_of(config: Config, known: Sequence[str] = ()) -> tuple[str, ...]:
    """The classes of a run, from labels alone: no image is opened.

    Raises:
      DataError: see `load`.
    """
    paths = [config.train] if isinstance(config.train, str) else list(config.train)
    return choose((one.label for one in find(paths, config.columns).pictures), known)


def unlabelled(
    pictures: Sequence[Picture], preprocess: pixels.Preprocess, *, max_pixels: int = MAX_PIXELS, workers: int = 0
) -> tuple[ImageRows, list[Bad]]:
    """Images to ask about, all of class 0, and those that cannot be decoded."""
    pool = Pool(How(preprocess, max_pixels), workers)
    seen = _seen(Found(list(pictures), [], []), pool, look_at_pixels)
    return _rows(seen, np.zeros(len(seen.pictures), np.int32), np.ones(len(seen.pictures), bool)), seen.bad


def look(config: Config, given: str | Sequence[str], preprocess: pixels.Preprocess) -> Seen:
    """Finds pictures and looks at each.

    Raises:
      DataError: see `load`.
    """
    paths = [given] if isinstance(given, str) else list(given)
    found = find(paths, config.columns)
    pool = Pool(How(preprocess, config.max_pixels, found.tables), config.workers)
    seen = _seen(found, pool, look_at_pixels if config.check == "pixels" else look_at_bytes)
    if seen.bad and config.on_bad_row == "error":
        raise refuse(seen.bad[:LISTED])
    if not seen.pictures:
        raise DataError(f"{', '.join(paths)} has no image that can be used; the first: {seen.bad[0]}")
    return seen


def _seen(found: Found, pool: Pool, work: Callable) -> Seen:
    """Looks at each picture."""
    looks: list[Look] = []
    with _progress(len(found.pictures)) as advance:
        for some, parts in pool.map(work, ((len(some), some) for some in _some(found.pictures)), depth=4):
            looks += itertools.chain.from_iterable(parts)
            advance(some)
    bad = [*found.bad, *(one.bad for one in looks if one.bad)]
    kept = [(picture, one.hash) for picture, one in zip(found.pictures, looks, strict=True) if not one.bad]
    return Seen([one for one, _ in kept], np.array([hash for _, hash in kept], np.uint64), bad, pool)


def _some(pictures: Sequence[Picture]) -> Iterator[Sequence[Picture]]:
    for start in range(0, len(pictures), SOME):
        yield pictures[start : start + SOME]


def numbered(pictures: Sequence[Picture], classes: Sequence[str]) -> Int[np.ndarray, "N"]:
    """The number of each picture's class.

    Raises:
      DataError: a label is none of the classes; the message names its place.

    Example:
      >>> numbered([Picture("a.png", "dog")], ("cat", "dog")).tolist()
      [1]
    """
    number = {name: i for i, name in enumerate(classes)}
    if other := [one for one in pictures if one.label not in number]:
        shown = ", ".join(classes[:8]) + ", ..." * (len(classes) > 8)
        more = f" (and {len(other) - 1:,} more)" if len(other) > 1 else ""
        raise DataError(
            f"{other[0].place}{more}: label {other[0].label!r} is none of the {len(classes)} classes {shown}; mend it, "
            "or give images of it to data.train"
        )
    return np.array([number[one.label] for one in pictures], np.int32)


def _rows(seen: Seen, labels: Int[np.ndarray, "N"], which: np.ndarray) -> ImageRows:
    kept, hasher = np.flatnonzero(which), hashlib.blake2b(digest_size=12)
    for part in (seen.hashes[kept], labels[kept], np.frombuffer(repr(seen.pool.how.preprocess).encode(), np.uint8)):
        hasher.update(part.tobytes())
    return ImageRows([seen.pictures[i] for i in kept], labels[kept], seen.pool, hasher.hexdigest())


def _contradicting(hashes: UInt64[np.ndarray, "N"], labels: Int[np.ndarray, "N"]) -> int:
    pairs = np.unique(np.stack([hashes, labels.astype(np.uint64)], axis=1), axis=0)
    return sum(count > 1 for count in Counter(pairs[:, 0].tolist()).values())


@contextmanager
def _progress(total: int):
    """A line with the images so far, gone when it ends; gives the function that counts more of them."""
    from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = [TextColumn("looking at images"), MofNCompleteColumn(), TimeRemainingColumn()]
    with Progress(*columns, transient=True, disable=jax.process_index() > 0) as bar:
        task = bar.add_task("", total=total)
        yield lambda count: bar.advance(task, count)
