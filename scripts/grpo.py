r"""GRPO and its kin: a policy answers each prompt several times, and learns to do as the better answers did.

    python scripts/grpo.py --config configs/digits_grpo.yaml
    python scripts/grpo.py --model.path runs/sft/merged --data.train gsm8k.jsonl --reward.functions '{exact_number: 1}'
    python scripts/grpo.py --model.path runs/sft/merged --data.train prompts.jsonl --reward.functions '{my.py:f: 1}' \
        --grpo.method dr_grpo

Rows are {"prompt": ...}, or of another format of docs/data.md; their other columns go to the reward functions, see
docs/rewards.md. docs/reinforcement.md tells how the policy learns.
"""

from dataclasses import dataclass

from jaxsft import (
    actor,
    config,
    data,
    hub,
    objectives,
    preflight,
    reinforce,
    report,
    results,
    rewards,
    run,
    sections,
    session,
)


@dataclass(frozen=True)
class Config:
    """A run of GRPO, or of one of its kin."""

    model: sections.Model = sections.Model()
    tuning: sections.Tuning = sections.Tuning()
    reward: sections.Rewards = sections.Rewards()
    grpo: sections.GRPO = sections.GRPO()
    rollout: sections.Sample = sections.Sample(temperature=1.0)
    data: sections.Data = sections.Data()
    optim: sections.Optim = sections.Optim(learning_rate=1e-5, schedule="constant")
    train: reinforce.Config = reinforce.Config(prompts=8, samples=8)
    mesh: sections.Mesh = sections.Mesh()
    run: sections.Run = sections.Run()
    sample: sections.Sample = sections.Sample()
    export: sections.Export = sections.Export()


def main(cfg: Config) -> None:
    # ---- where: the folder, the devices --------------------------------------------------------------------------
    _, shape = hub.read_config(hub.resolve(cfg.model.path))
    objectives.expect("causal", shape, cfg.data.max_length)
    g, temperature, new = cfg.grpo, cfg.rollout.temperature, cfg.rollout.max_new_tokens
    learning = objectives.grpo_learning(g, max_new_tokens=new, temperature=temperature)
    if cfg.run.plan:
        work = preflight.over_rollouts(learning, answers=cfg.train.answers, reference=g.kl_coef > 0)
        parts = (cfg.model, cfg.tuning, cfg.optim, cfg.train.step, cfg.mesh, cfg.data.max_length + new)
        preflight.show(work, preflight.Sections(*parts), cfg.run.device_gb)
        return
    folder, mesh = session.start(cfg.run, cfg.mesh)

    # ---- what to answer ------------------------------------------------------------------------------------------
    tokenizer, vocabulary = session.load_tokenizer(cfg.model, cfg.data.template)
    prompts, held_out, found = data.load_prompts(cfg.data, tokenizer)
    report.summary("data", dict(found.lines()))
    row_length = reinforce.length_of_rows(cfg.train, prompts, new, shape.max_position)

    # ---- what learns, and what judges ----------------------------------------------------------------------------
    learner = session.load(cfg.model, cfg.tuning, mesh, seed=cfg.train.seed, vocabulary=vocabulary)
    learner = session.with_reference(learner) if g.kl_coef else learner
    learner, judge = session.with_judge(learner, cfg.reward.model, cfg.model, mesh)
    objective = objectives.policy(learner.model, **learning)
    score = objectives.grpo_scoring(
        learner.model,
        method=g.method,
        scale=g.scale,
        samples=cfg.train.samples,
        reference=g.kl_coef > 0,
        old=cfg.train.epochs * cfg.train.minibatches > 1,
        temperature=temperature,
        judge=judge,
        judge_weight=cfg.reward.model_weight,
        pieces=cfg.train.minibatches * cfg.train.microbatches,
    )

    # ---- draw, judge, learn, and again ---------------------------------------------------------------------------
    stop = hub.stop_tokens(cfg.model.path, tokenizer)
    r = cfg.reward
    with rewards.load(r.functions, timeout=r.timeout, workers=r.workers, required=not r.model) as functions:
        act = actor.act(learner.model, tokenizer, stop, cfg.rollout, functions)
        shown = actor.act(learner.model, tokenizer, stop, cfg.sample, functions)
        learner = reinforce.learn(
            objective,
            score,
            learner,
            prompts,
            act=act,
            evaluate=actor.examination(
                shown,
                held_out,
                tokenizer,
                seed=cfg.sample.seed,
                score=session.scorer(learner, judge),
                weight=cfg.reward.model_weight,
            ),
            rules=reinforce.Rules(judge is not None, g.missing_eos_penalty, g.mask_truncated),
            tokenizer=tokenizer,
            row_length=row_length,
            charge=reinforce.Charge(g.kl_coef, stop=g.kl_stop),
            config=cfg.train,
            optimizer=cfg.optim,
            mesh=mesh,
            folder=folder,
            recorded=config.flat(cfg),
            show=cfg.run.samples,
        )

    # ---- what it leaves ------------------------------------------------------------------------------------------
    kept = {"tokenizer": tokenizer, "config": cfg.export, "quantise": cfg.model.quantise}
    written = results.save(folder, cfg.model.path, learner, **kept)
    samples = reinforce.before_and_after(folder, cfg.run.samples)
    report.finish(
        folder, samples, written | {"answers": folder / reinforce.SAMPLES}, unit="of a token", measure="reward"
    )


if __name__ == "__main__":
    run.guard(lambda: main(config.parse(Config)))
