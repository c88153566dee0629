"""Preference learning: teach a checkpoint which of two answers is better, or which answers are wanted.

    python scripts/dpo.py --config configs/dpo.yaml
    python scripts/dpo.py --model.path runs/sft/merged --data.train pairs.jsonl --preference.loss '{ipo: 1, sft: 0.2}'
    python scripts/dpo.py --model.path runs/sft/merged --data.train judged.jsonl --preference.loss kto

Rows are {"prompt", "chosen", "rejected"}, or for KTO and its kin {"prompt", "completion", "label"}, or of another
format of docs/data.md; docs/preference.md lists the losses.
"""

from dataclasses import dataclass

import numpy as np

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
    sample,
    sections,
    session,
)


@dataclass(frozen=True)
class Config:
    """A run of preference learning."""

    model: sections.Model = sections.Model()
    tuning: sections.Tuning = sections.Tuning()
    preference: sections.Preference = sections.Preference()
    data: sections.Data = sections.Data()
    optim: sections.Optim = sections.Optim(learning_rate=5e-6)
    train: sections.Train = sections.Train()
    mesh: sections.Mesh = sections.Mesh()
    run: sections.Run = sections.Run()
    sample: sections.Sample = sections.Sample()
    export: sections.Export = sections.Export()


def show(held_out: data.PackedPairs, tokenizer, count: int, before: dict, after: dict) -> None:
    """Prints what held-out pairs have become, and some of them."""
    if "reward" in after:  # answers one by one
        wanted = held_out.values[after["row"]] > 0
        preferences.show({"reward after, turned round where not wanted": np.where(wanted, 1, -1) * after["reward"]})
        return
    was, now = (found["logps_chosen"] - found["logps_rejected"] for found in (before, after))
    names = ("log-probability before", "log-probability after", "reward after")
    margins: dict[str, np.ndarray] = dict(zip(names, (was, now, after["margin"]), strict=True))
    preferences.show(margins, held_out.longer[after["row"]])
    shown = data.comparisons(held_out, tokenizer, count)
    preferences.compare(shown, after["row"], was, now, "log-probability of chosen less that of rejected")


def main(cfg: Config) -> None:
    # ---- where: the folder, the devices --------------------------------------------------------------------------
    _, shape = hub.read_config(hub.resolve(cfg.model.path))
    objectives.expect("causal", shape, cfg.data.max_length)
    learning, live = objectives.of(cfg.preference), cfg.preference.needs_reference == "live"
    if cfg.run.plan:
        parts = (cfg.model, cfg.tuning, cfg.optim, cfg.train, cfg.mesh, 2 * cfg.data.max_length)
        preflight.show(preflight.over_pairs(learning, reference=live), preflight.Sections(*parts), cfg.run.device_gb)
        return
    folder, mesh = session.start(cfg.run, cfg.mesh, cfg.train, 2 * cfg.data.max_length)

    # ---- what to learn from --------------------------------------------------------------------------------------
    tokenizer, vocabulary = session.load_tokenizer(cfg.model, cfg.data.template)
    kind = "unpaired" if cfg.preference.unpaired else "preference"
    rows, held_out, found = data.load_pairs(cfg.data, tokenizer, kind, share_prompt=models.shares_prompts(shape))
    report.summary("data", dict(found.lines()))

    # ---- what learns, and what it is compared with ---------------------------------------------------------------
    learner = session.load(cfg.model, cfg.tuning, mesh, seed=cfg.train.seed, vocabulary=vocabulary)
    if live:
        learner = session.with_reference(learner)
    elif cfg.preference.needs_reference == "precomputed":
        said = objectives.said(learner.model, ld_alpha=cfg.preference.ld_alpha)
        how = {"batch_size": cfg.train.batch_size, "mesh": mesh, "cache": data.cache(cfg.data)}
        how |= {"model": cfg.model, "detail": f"ld_alpha {cfg.preference.ld_alpha}"}
        rows = session.precompute(said, learner, rows, **how)
        held_out = None if held_out is None else session.precompute(said, learner, held_out, **how)

    # ---- learn, and see what changed -----------------------------------------------------------------------------
    pairwise = learning(learner.model)
    asked = data.questions(held_out, tokenizer, cfg.run.samples) if held_out else []
    stop = hub.stop_tokens(cfg.model.path, tokenizer)
    ask = sample.asker(learner.model, tokenizer, [question.ids for question in asked], stop, cfg.sample)
    before = ask(learner.variables)
    measure = None
    if held_out is not None:
        measure = session.measure(pairwise.each, held_out, batch_size=cfg.train.batch_size, mesh=mesh)
    pairs_before = measure(learner) if measure else {}
    learner = session.learn(
        pairwise.objective,
        learner,
        rows,
        held_out,
        prepare=pairwise.prepare,
        config=cfg.train,
        optimizer=cfg.optim,
        mesh=mesh,
        folder=folder,
        recorded=config.flat(cfg),
    )
    after = ask(learner.variables)

    # ---- what it leaves ------------------------------------------------------------------------------------------
    kept = {"tokenizer": tokenizer, "config": cfg.export, "quantise": cfg.model.quantise}
    written = results.save(folder, cfg.model.path, learner, **kept)
    if measure and held_out is not None:
        show(held_out, tokenizer, cfg.run.samples, pairs_before, measure(learner))
    samples = [(q.text, q.answer, b, a) for q, b, a in zip(asked, before, after, strict=True)]
    report.finish(folder, samples, written, unit="of an answer" if cfg.preference.unpaired else "of a pair")


if __name__ == "__main__":
    run.guard(lambda: main(config.parse(Config)))
