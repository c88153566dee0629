"""Pre-training: teach a model plain text, from where it is (continued pre-training) or from random weights.

    python scripts/pretrain.py --config configs/pretrain.yaml
    python scripts/pretrain.py --config configs/base_model.yaml

Rows are {"text": ...}; every token is learned exactly once an epoch.
"""

import dataclasses
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from jaxsft import (
    config,
    data,
    hub,
    objectives,
    report,
    results,
    run,
    sample,
    sections,
    session,
    sharding,
    tree,
    tuning,
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
    train: sections.Train = sections.Train()
    mesh: sections.Mesh = sections.Mesh()
    run: sections.Run = sections.Run()
    sample: sections.Sample = sections.Sample(max_new_tokens=64)
    export: sections.Export = sections.Export()


def main(cfg: Config) -> None:
    # ---- where: the folder, the devices --------------------------------------------------------------------------
    if cfg.init == "random" and cfg.tuning.method != "full":
        raise run.RunError(
            f"init random needs tuning.method full, not {cfg.tuning.method}: random weights must all learn"
        )
    folder = run.start(cfg.run)
    mesh = sharding.mesh(**dataclasses.asdict(cfg.mesh))
    key_model = jax.random.key(cfg.train.seed)

    # ---- what to learn from --------------------------------------------------------------------------------------
    tokenizer = data.with_template(hub.load_tokenizer(cfg.model.path), cfg.data.template)
    rows, held_out, found = data.load(cfg.data, tokenizer)
    report.summary("data", dict(found.lines()))

    # ---- what learns ---------------------------------------------------------------------------------------------
    family, shape = hub.read_config(hub.resolve(cfg.model.path))
    plan = tuning.plan(cfg.tuning, shape.layers)
    kind = {"dtype": jnp.dtype(cfg.model.dtype), "remat": cfg.model.remat}
    if cfg.init == "random":
        model, params = hub.init(cfg.model.path, key_model, mesh, **kind)
    else:
        dropout = plan.lora.dropout if plan.lora else 0.0
        kind |= {"full_precision": plan.trainable, "cut": plan.cut, "lora_dropout": dropout}
        model, params = hub.load(cfg.model.path, mesh, **kind)
    trainable, frozen = tuning.apply(plan, params, key_model, mesh=mesh, rules=family.rules)
    report.summary("model", tuning.describe(plan, trainable, frozen))

    # ---- learn, and see what changed -----------------------------------------------------------------------------
    asked = data.questions(held_out, tokenizer, cfg.run.samples) if held_out else []
    stop = hub.stop_tokens(cfg.model.path, tokenizer)
    ask = sample.asker(model, tokenizer, [question.ids for question in asked], stop, cfg.sample)
    before = ask(tree.combine(trainable, frozen))
    state = session.learn(
        objectives.supervised(model),
        trainable,
        frozen,
        rows,
        held_out,
        config=cfg.train,
        optimizer=cfg.optim,
        mesh=mesh,
        folder=folder,
        recorded=config.flat(cfg),
    )
    after = ask(tree.combine(state.trainable, frozen))

    # ---- what it leaves ------------------------------------------------------------------------------------------
    if cfg.init == "random":  # there is no base to merge into
        merged = folder / "merged"
        hub.export(str(merged), state.trainable["params"], source=cfg.model.path, shard_gb=cfg.export.shard_gb)
        written = {"merged": merged}
    else:
        written = results.save(
            folder, cfg.model.path, plan, state.trainable, frozen, tokenizer=tokenizer, config=cfg.export
        )
    samples = [(q.text, q.answer, b, a) for q, b, a in zip(asked, before, after, strict=True)]
    report.finish(folder, samples, written)


if __name__ == "__main__":
    run.guard(lambda: main(config.parse(Config)))
