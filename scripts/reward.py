"""Reward model: teach a checkpoint to score answers, from pairs of which one answer is better.

    python scripts/reward.py --config configs/reward.yaml
    python scripts/reward.py --model.path runs/sft/merged --data.train pairs.jsonl --data.val_fraction 0.1

Rows are {"prompt", "chosen", "rejected"} or of another format of docs/data.md. A linear layer on the last token's
features gives the score; `merged/` is what transformers calls a model for sequence classification with one label.
"""

import functools
from dataclasses import dataclass

from jaxsft import (
    config,
    data,
    hub,
    models,
    objectives,
    preferences,
    preflight,
    report,
    results,
    run,
    sections,
    session,
)


@dataclass(frozen=True)
class Config:
    """A run that makes a reward model."""

    model: sections.Model = sections.Model()
    tuning: sections.Tuning = sections.Tuning()
    reward: sections.Reward = sections.Reward()
    data: sections.Data = sections.Data()
    optim: sections.Optim = sections.Optim(learning_rate=1e-4)
    train: sections.Train = sections.Train()
    mesh: sections.Mesh = sections.Mesh()
    run: sections.Run = sections.Run()
    export: sections.Export = sections.Export()


def main(cfg: Config) -> None:
    # ---- where: the folder, the devices --------------------------------------------------------------------------
    _, shape = hub.read_config(hub.resolve(cfg.model.path), labels=1)
    objectives.expect("score", shape, cfg.data.max_length)
    learning = functools.partial(objectives.bradley_terry, center=cfg.reward.center)
    if cfg.run.plan:
        parts = (cfg.model, cfg.tuning, cfg.optim, cfg.train, cfg.mesh, 2 * cfg.data.max_length)
        preflight.show(preflight.over_pairs(learning, labels=1), preflight.Sections(*parts), cfg.run.device_gb)
        return
    folder, mesh = session.start(cfg.run, cfg.mesh, cfg.train, 2 * cfg.data.max_length)

    # ---- what to learn from --------------------------------------------------------------------------------------
    tokenizer, vocabulary = session.load_tokenizer(cfg.model, cfg.data.template)
    shared = models.shares_prompts(shape)
    rows, held_out, found = data.load_pairs(cfg.data, tokenizer, "preference", share_prompt=shared)
    report.summary("data", dict(found.lines()))

    # ---- what learns ---------------------------------------------------------------------------------------------
    learner = session.load(cfg.model, cfg.tuning, mesh, seed=cfg.train.seed, labels=1, vocabulary=vocabulary)

    # ---- learn, and see what changed -----------------------------------------------------------------------------
    pairwise = learning(learner.model)
    measure = None
    if held_out is not None:
        measure = session.measure(pairwise.each, held_out, batch_size=cfg.train.batch_size, mesh=mesh)
    before = measure(learner) if measure else {}
    learner = session.learn(
        pairwise.objective,
        learner,
        rows,
        held_out,
        config=cfg.train,
        optimizer=cfg.optim,
        mesh=mesh,
        folder=folder,
        recorded=config.flat(cfg),
    )

    # ---- what it leaves ------------------------------------------------------------------------------------------
    kept = {"tokenizer": tokenizer, "config": cfg.export, "quantise": cfg.model.quantise}
    written = results.save(folder, cfg.model.path, learner, **kept)
    if measure and held_out is not None:
        after, written["calibration"] = measure(learner), folder / "calibration.png"
        preferences.show(
            {"score before": before["margin"], "score after": after["margin"]}, held_out.longer[after["row"]]
        )
        preferences.plot_calibration(after["margin"], folder / "calibration.png")
        shown = data.comparisons(held_out, tokenizer, cfg.run.samples)
        scored = (before["margin"], after["margin"])
        preferences.compare(shown, after["row"], *scored, "score of chosen less that of rejected")
    report.finish(folder, [], written, unit="of a pair")


if __name__ == "__main__":
    run.guard(lambda: main(config.parse(Config)))
