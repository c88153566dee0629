"""Image classification: teach a backbone, or a network from random weights, the classes of your own pictures.

    python scripts/classify.py --config configs/classify.yaml
    python scripts/classify.py --model.path google/vit-base-patch16-224-in21k --data.train photos/ \
        --data.val_fraction 0.2 --run.output_dir runs/photos

Pictures come from rows {"image_path": "photos/1.jpg", "label": "rose"}, from a folder with a folder for each class, or
from a data set with a column of images; see docs/images.md. `scripts/predict.py` asks the result.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax
import numpy as np
from jax.sharding import Mesh

from jaxsft import (
    classes,
    classify,
    config,
    data,
    hub,
    mistakes,
    models,
    objectives,
    preflight,
    probe,
    report,
    results,
    run,
    sections,
    session,
)


@dataclass(frozen=True)
class Config:
    """A run that teaches classes of images."""

    model: sections.Model = sections.Model()
    init: Literal["pretrained", "random"] = "pretrained"
    """start from the weights in model.path, or from random ones of the shape in its config.json"""
    tuning: sections.Tuning = sections.Tuning()
    data: sections.Images = sections.Images()
    augment: sections.Augment = sections.Augment()
    probe: int = 2000
    """images to learn, and as many held-out ones, by whose vectors the backbone is judged before training: by nearest
    neighbours and by a linear classifier; 0 for none"""
    optim: sections.Optim = sections.Optim(learning_rate=1e-3)
    train: sections.Train = sections.Train(batch_size=32)
    mesh: sections.Mesh = sections.Mesh()
    run: sections.Run = sections.Run()
    export: sections.Export = sections.Export()


def check(cfg: Config, shape: models.ModelConfig) -> None:
    """Refuses what cannot work, before anything takes time."""
    if not isinstance(shape, models.VisionConfig):
        raise run.RunError(
            f"{cfg.model.path} reads texts, not images; choose one of the families {', '.join(models.VISION)}"
        )
    if cfg.model.new_tokens or cfg.model.new_special_tokens:
        raise run.RunError("model.new_tokens is for models of texts; an image has none")
    if cfg.init == "random" and (cfg.tuning.method != "full" or cfg.model.quantise != "none"):
        raise run.RunError(
            "init random needs tuning.method full and model.quantise none: random weights must all learn"
        )


def main(cfg: Config) -> None:
    # ---- where: the folder, the devices --------------------------------------------------------------------------
    source = hub.resolve(cfg.model.path)
    check(cfg, hub.read_config(source)[1])
    preprocess, known = data.pixels.read(source), hub.classes(cfg.model.path)
    learning = functools.partial(_learning, cfg, preprocess)
    if cfg.run.plan:
        names = data.images.classes_of(cfg.data, known)
        size = data.images.sized(cfg.data, preprocess).shape
        parts = (cfg.model, cfg.tuning, cfg.optim, cfg.train, cfg.mesh, 1)
        work = preflight.over_images(learning, labels=len(names), size=size)
        preflight.show(work, preflight.Sections(*parts), cfg.run.device_gb)
        return
    folder, mesh = session.start(cfg.run, cfg.mesh, cfg.train, 1)

    # ---- what to learn from --------------------------------------------------------------------------------------
    settled = data.images.read_labels(folder) if cfg.run.resume else None
    found = data.images.load(cfg.data, preprocess, known=known, classes=settled)
    report.summary("data", dict(found.report.lines()))
    if jax.process_index() == 0:
        data.images.save_labels(folder, found.classes)

    # ---- what learns ---------------------------------------------------------------------------------------------
    seed, count = cfg.train.seed, len(found.classes)
    if cfg.init == "random":
        learner = session.draw(cfg.model, mesh, seed=seed, labels=count)
    else:
        learner = session.load(cfg.model, cfg.tuning, mesh, seed=seed, labels=count)

    # ---- learn, and see what changed -----------------------------------------------------------------------------
    normalise = functools.partial(data.pixels.normalise, preprocess)
    ask = functools.partial(classify.scores, learner.model, batch_size=cfg.train.batch_size, mesh=mesh)
    before = None
    if found.eval is not None:
        baseline(cfg, learner, found, normalise, mesh)
        scores = ask(learner.variables, found.eval, normalise)
        before = classes.measure(scores, found.eval.labels, found.classes)
    learned = learning(learner.model, weights=found.weights)
    learner = session.learn(
        learned.objective,
        learner,
        found.train,
        found.eval,
        prepare=learned.prepare,
        config=cfg.train,
        optimizer=cfg.optim,
        mesh=mesh,
        folder=folder,
        recorded=config.flat(cfg),
    )

    # ---- what it leaves ------------------------------------------------------------------------------------------
    kept = {"classes": found.classes, "preprocess": found.train.pool.how.preprocess, "config": cfg.export}
    written = results.save_images(folder, cfg.model.path, learner, random=cfg.init == "random", **kept)
    if found.eval is not None:
        scores = ask(learner.variables, found.eval, normalise)
        written |= tell(folder, found, scores, before)
    report.finish(folder, [], written, unit="nats an image")


def _learning(
    cfg: Config, preprocess: data.pixels.Preprocess, model: models.Model, weights: np.ndarray | None = None
) -> objectives.Classification:
    """What is learned of the images."""
    normalise = functools.partial(data.pixels.normalise, preprocess)
    key = jax.random.fold_in(jax.random.key(cfg.train.seed), 1)  # 0 draws adapter and classifier
    return objectives.classification(model, normalise, how=cfg.augment, weights=weights, key=key)


def baseline(cfg: Config, learner: session.Learner, found: data.images.Loaded, normalise: Callable, mesh: Mesh) -> None:
    """Prints what the backbone's vectors are good for as they are."""
    if not cfg.probe or found.eval is None:
        return
    some, held = found.train.some(cfg.probe), found.eval.some(cfg.probe)
    see = functools.partial(classify.vectors, learner.model, learner.variables, normalise=normalise, mesh=mesh)
    known, asked = (see(rows=rows, batch_size=cfg.train.batch_size) for rows in (some, held))
    count = len(found.classes)
    near, line = (by(known, some.labels, asked, classes=count) for by in (probe.neighbours, probe.linear))
    most = np.bincount(some.labels, minlength=count).argmax()
    told = {
        "images": f"{len(some):,} known, {len(held):,} held out",
        "nearest neighbours": str(report.share((near.argmax(-1) == held.labels).astype(float))),
        "linear classifier": str(report.share((line.argmax(-1) == held.labels).astype(float))),
        "always the commonest class": str(report.share((held.labels == most).astype(float))),
    }
    report.summary("the backbone as it is", told)


def tell(
    folder: Path, found: data.images.Loaded, scores: np.ndarray, before: classes.Figures | None
) -> dict[str, Path]:
    """Prints and writes what held-out images have become."""
    rows = found.eval
    assert rows is not None
    figures = classes.measure(scores, rows.labels, found.classes)
    if jax.process_index():
        return {}
    classes.show(figures, before)
    places, labels = [one.path or one.place for one in rows.pictures], [found.classes[i] for i in rows.labels]
    said = classes.said(scores, found.classes, places, labels)
    files = {
        "figures": folder / "classes.json",
        "confusion": folder / "confusion.png",
        "calibration": folder / "calibration.png",
        "predictions": folder / "predictions.jsonl",
        "mistakes": folder / "mistakes.html",
    }
    classes.write(figures, files["figures"])
    classes.plot_confusion(figures, files["confusion"])
    classes.plot_calibration(figures, files["calibration"])
    classes.write_rows(said, files["predictions"])
    mistakes.write(said, rows.picture, files["mistakes"])
    return files


if __name__ == "__main__":
    run.guard(lambda: main(config.parse(Config)))
