"""Pre-training: teach a model plain text, from where it is (continued pre-training) or from random weights.

    python scripts/pretrain.py --config configs/pretrain.yaml
    python scripts/pretrain.py --config configs/base_model.yaml
    python scripts/pretrain.py --config configs/masked.yaml

Rows are {"text": ...}. A decoder learns every token exactly once an epoch, from those before it. An encoder (BERT,
RoBERTa) learns with `--train.objective masked`: each time a row comes other tokens of it are hidden, 15% by default, or
whole words with `--train.whole_words true`, and predicted from both sides; `trained_tokens` counts those.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from jaxsft import (
    config,
    data,
    hub,
    models,
    objectives,
    preflight,
    report,
    results,
    run,
    sample,
    sections,
    session,
    tree,
)


@dataclass(frozen=True)
class Config:
    """A pre-training run."""

    model: sections.Model = sections.Model()
    init: Literal["pretrained", "random"] = "pretrained"
    """start from the weights in model.path, or from random ones of the shape in its config.json"""
    tuning: sections.Tuning = sections.Tuning(method="full")
    data: sections.Data = sections.Data(format="text")
    optim: sections.Optim = sections.Optim()
    train: sections.Pretraining = sections.Pretraining()
    mesh: sections.Mesh = sections.Mesh()
    run: sections.Run = sections.Run()
    sample: sections.Sample = sections.Sample(max_new_tokens=64)
    export: sections.Export = sections.Export()


def check(cfg: Config, shape: models.ModelConfig) -> None:
    """Refuses what cannot work, before anything takes time."""
    objectives.expect(cfg.train.objective, shape, cfg.data.max_length)
    if cfg.init == "random" and cfg.tuning.method != "full":
        raise run.RunError(
            f"init random needs tuning.method full, not {cfg.tuning.method}: random weights must all learn"
        )
    if cfg.init == "random" and cfg.model.quantise != "none":
        raise run.RunError(
            f"init random needs model.quantise none, not {cfg.model.quantise}: what learns is not packed"
        )
    tables = cfg.model.new_tokens or cfg.model.new_special_tokens or tree.matches(cfg.tuning.trainable, "embed/table")
    if isinstance(shape, models.EncoderConfig) and tables and cfg.tuning.method == "lora" and cfg.export.adapter:
        raise run.RunError(
            "the embedding trains, which is the output layer of an encoder as well, and PEFT's folders cannot hold "
            "that; set export.adapter to false and take the merged model, or tuning.method to full"
        )
    if cfg.train.whole_words and cfg.train.objective == "causal":
        raise run.RunError("train.whole_words is for train.objective masked; the objective is causal")


def main(cfg: Config) -> None:
    # ---- where: the folder, the devices --------------------------------------------------------------------------
    _, shape = hub.read_config(hub.resolve(cfg.model.path))
    check(cfg, shape)
    tokenizer, vocabulary = session.load_tokenizer(cfg.model, cfg.data.template)
    gaps = data.masking(tokenizer, whole_words=cfg.train.whole_words) if cfg.train.objective == "masked" else None
    learning: Callable[..., objectives.Objective] = objectives.supervised
    if gaps:
        learning = functools.partial(objectives.masked, rate=cfg.train.mask_rate, **gaps._asdict())
    if cfg.run.plan:
        parts = (cfg.model, cfg.tuning, cfg.optim, cfg.train, cfg.mesh, cfg.data.max_length)
        preflight.show(preflight.over_tokens(learning), preflight.Sections(*parts), cfg.run.device_gb)
        return
    folder, mesh = session.start(cfg.run, cfg.mesh, cfg.train, cfg.data.max_length)

    # ---- what to learn from --------------------------------------------------------------------------------------
    rows, held_out, found = data.load(cfg.data, tokenizer, "masked" if gaps else "learn")
    report.summary("data", dict(found.lines()))

    # ---- what learns ---------------------------------------------------------------------------------------------
    if cfg.init == "random":
        learner = session.draw(cfg.model, mesh, seed=cfg.train.seed, vocabulary=vocabulary)
    else:
        learner = session.load(cfg.model, cfg.tuning, mesh, seed=cfg.train.seed, vocabulary=vocabulary)

    # ---- learn, and see what changed -----------------------------------------------------------------------------
    asked = (data.blanks if gaps else data.questions)(held_out, tokenizer, cfg.run.samples) if held_out else []
    prompts = [question.ids for question in asked]
    if gaps:
        ask = sample.filler(learner.model, tokenizer, prompts, gaps.mask_id)
    else:
        stop = hub.stop_tokens(cfg.model.path, tokenizer)
        ask = sample.asker(learner.model, tokenizer, prompts, stop, cfg.sample)
    before = ask(learner.variables)
    learner = session.learn(
        learning(learner.model),
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
    if cfg.init == "random":  # there is no base to merge into
        merged = folder / "merged"
        hub.export(str(merged), learner.trainable["params"], source=cfg.model.path, shard_gb=cfg.export.shard_gb)
        hub.save_tokens(merged, tokenizer, cfg.model.path)
        written = {"merged": merged}
    else:
        kept = {"tokenizer": tokenizer, "config": cfg.export, "quantise": cfg.model.quantise}
        written = results.save(folder, cfg.model.path, learner, **kept)
    samples = [(q.text, q.answer, b, a) for q, b, a in zip(asked, before, after, strict=True)]
    report.finish(folder, samples, written)


if __name__ == "__main__":
    run.guard(lambda: main(config.parse(Config)))
