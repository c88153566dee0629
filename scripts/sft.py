"""Supervised fine-tuning: teach a Hugging Face checkpoint your own dialogues.

    python scripts/sft.py --config configs/quickstart.yaml
    python scripts/sft.py --config configs/quickstart.yaml --data.train mine.jsonl --run.output_dir runs/mine

Rows are {"instruction", "input", "output"}, {"messages": [{"role", "content"}, ...]} or of any format in docs/data.md;
look at them with scripts/inspect_data.py first.
"""

from dataclasses import dataclass

from jaxsft import config, data, hub, objectives, preflight, report, results, run, sample, sections, session


@dataclass(frozen=True)
class Config:
    """A fine-tuning run."""

    model: sections.Model = sections.Model()
    tuning: sections.Tuning = sections.Tuning()
    data: sections.Data = sections.Data()
    optim: sections.Optim = sections.Optim()
    train: sections.Train = sections.Train()
    mesh: sections.Mesh = sections.Mesh()
    run: sections.Run = sections.Run()
    sample: sections.Sample = sections.Sample()
    export: sections.Export = sections.Export()


def main(cfg: Config) -> None:
    # ---- where: the folder, the devices --------------------------------------------------------------------------
    _, shape = hub.read_config(hub.resolve(cfg.model.path))
    objectives.expect("causal", shape, cfg.data.max_length)
    if cfg.run.plan:
        parts = (cfg.model, cfg.tuning, cfg.optim, cfg.train, cfg.mesh, cfg.data.max_length)
        preflight.show(preflight.over_tokens(objectives.supervised), preflight.Sections(*parts), cfg.run.device_gb)
        return
    folder, mesh = session.start(cfg.run, cfg.mesh, cfg.train, cfg.data.max_length)

    # ---- what to learn from --------------------------------------------------------------------------------------
    tokenizer, vocabulary = session.load_tokenizer(cfg.model, cfg.data.template)
    rows, held_out, found = data.load(cfg.data, tokenizer)
    report.summary("data", dict(found.lines()))

    # ---- what learns ---------------------------------------------------------------------------------------------
    learner = session.load(cfg.model, cfg.tuning, mesh, seed=cfg.train.seed, vocabulary=vocabulary)

    # ---- learn, and see what changed -----------------------------------------------------------------------------
    asked = data.questions(held_out, tokenizer, cfg.run.samples) if held_out else []
    stop = hub.stop_tokens(cfg.model.path, tokenizer)
    ask = sample.asker(learner.model, tokenizer, [question.ids for question in asked], stop, cfg.sample)
    before = ask(learner.variables)
    learner = session.learn(
        objectives.supervised(learner.model),
        learner,
        rows,
        held_out,
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
    samples = [(q.text, q.answer, b, a) for q, b, a in zip(asked, before, after, strict=True)]
    report.finish(folder, samples, written)


if __name__ == "__main__":
    run.guard(lambda: main(config.parse(Config)))
