"""Asks a classifier of images: what is in these files and folders?

    python scripts/predict.py --model runs/classify/merged photo.jpg other.png
    python scripts/predict.py --model runs/classify/merged --out predictions.jsonl photos/

prints the likeliest class of each picture with its probability, and the next ones. Any checkpoint that transformers
calls ...ForImageClassification will do, from a folder or the hub. A picture that cannot be read is told, and the others
go on.
"""

import functools
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jax
import numpy as np

from jaxsft import classes, classify, config, data, hub, report, run, sharding


@dataclass(frozen=True)
class Config:
    """Which pictures, and who is asked."""

    model: str = ""
    """a folder with config.json, weights and preprocessor_config.json, or a hub name"""
    images: list[str] = field(default_factory=list)
    """files, and folders with all pictures below them; on the command line they may stand by themselves"""
    out: str = ""
    """a file that takes all of it, a JSON object a line: image, prediction, probability, top"""
    top: int = 3
    """classes that are printed of a picture"""
    batch_size: int = 32
    """pictures that the model sees at one time"""
    image_size: int | None = None
    """pixels of a side of what the model sees; by default what its preprocessor_config.json says"""
    workers: int = 0
    """processes that decode; 0: a few threads of this one"""


def main(cfg: Config) -> None:
    # ---- what is asked -------------------------------------------------------------------------------------------
    if not cfg.model or not cfg.images:
        raise run.RunError("give --model, and files or folders of pictures")
    pictures = data.images.files(cfg.images)
    preprocess = data.pixels.read(hub.resolve(cfg.model))
    preprocess = data.pixels.at(preprocess, cfg.image_size) if cfg.image_size else preprocess
    rows, bad = data.images.unlabelled(pictures, preprocess, workers=cfg.workers)

    # ---- who is asked --------------------------------------------------------------------------------------------
    mesh = sharding.mesh(devices=jax.devices()[:1])
    model, variables = hub.load_variables(cfg.model, mesh)
    names = hub.classes(cfg.model)
    normalise = functools.partial(data.pixels.normalise, preprocess)
    size = min(cfg.batch_size, max(len(rows), 1))
    scores = np.zeros((0, len(names)))
    if len(rows):
        scores = classify.scores(model, variables, rows, normalise, batch_size=size, mesh=mesh)

    # ---- what it says --------------------------------------------------------------------------------------------
    said = classes.said(scores, names, [one.path for one in rows.pictures])
    told = [(row["image"], *_words(row["top"], cfg.top)) for row in said]
    report.table("pictures", ("picture", "class", "probability", "or"), told, lines=False)
    if bad:
        report.table("not read", ("picture", "why"), [(one.place, one.reason) for one in bad], lines=False)
    if cfg.out:
        classes.write_rows(said, Path(cfg.out))
        print(f"{len(said):,} predictions in {cfg.out}")
    if bad and not said:
        raise run.RunError(f"none of {len(bad):,} pictures could be read")


def _words(top: dict[str, float], count: int) -> tuple[str, str, str]:
    """The likeliest class, its probability, and those that come next."""
    (name, chance), *others = list(top.items())[: max(count, 1)]
    return name, f"{chance:.1%}", ", ".join(f"{other} {less:.1%}" for other, less in others)


def gathered(words: Sequence[str]) -> list[str]:
    """A command line whose pictures stand by themselves, as options alone.

    Example:
      >>> gathered(["--model", "m", "a.jpg", "b.jpg", "--top", "1"])
      ['--model', 'm', '--top', '1', '--images', '["a.jpg", "b.jpg"]']
    """
    options, pictures, rest = [], [], list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("-"):
            pictures.append(word)
        elif "=" in word or word in ("--help", "-h", "--print_config") or not rest:
            options.append(word)
        else:
            options += [word, rest.pop(0)]
    return [*options, *(["--images", json.dumps(pictures)] if pictures else [])]


if __name__ == "__main__":
    run.guard(lambda: main(config.parse(Config, gathered(sys.argv[1:]))))
