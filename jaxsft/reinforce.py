"""The loop of reinforcement learning: draw answers, judge them, learn from them, and again.

An iteration is three compiled programs, one after the other: `sample.generate` draws, `score` asks the models what they
say of what was drawn and makes `Rollouts` of it, and `step` learns from minibatches of these. Between the first and the
second, reward functions see text. Everything random is a function of the seed and of the iteration's number, so a
checkpoint at the end of an iteration is all that is needed to go on.
"""

import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from jaxsft import actor, axes, checkpoint, data, hosts, losses, optim, report, rollouts, sharding, train, tree
from jaxsft.actor import Act, Episodes
from jaxsft.hosts import Stopped
from jaxsft.objectives import Judged, Objective, policy_of
from jaxsft.run import Log, RunError, keep_until, read_metrics
from jaxsft.train import Step, init, make_step
from jaxsft.tree import Tree
from jaxsft.tuning import Learner
from jaxsft.types import Rollouts, State

SAMPLES = "samples.jsonl"


@dataclass(frozen=True)
class Config:
    """How long, and in what pieces, to draw answers and learn from them."""

    iterations: int = 100
    """rollouts of the run, each learned from before the next one is drawn"""
    prompts: int = 64
    """prompts of a rollout"""
    samples: int = 1
    """answers to each prompt"""
    epochs: int = 1
    """passes over the answers of a rollout"""
    minibatches: int = 1
    """optimizer steps of a pass"""
    microbatches: int = 1
    """pieces that a minibatch is computed in, one after the other, to save memory; the result is the same"""
    row_length: int | None = None
    """tokens of a row into which episodes are packed; by default those of the longest there can be"""
    eval_every: int = 10
    """iterations between evaluations on data.eval, whose answers go to samples.jsonl; 0 for before and after only"""
    save_every: int = 50
    """iterations between checkpoints; one is written at the end as well, and 0 writes only that"""
    keep: int = 3
    """checkpoints that stay, the last ones"""
    seed: int = 0
    """of adapters, the order of prompts, the answers drawn and dropout"""

    @property
    def answers(self) -> int:
        """Answers of a rollout."""
        return self.prompts * self.samples

    @property
    def step(self) -> train.Config:
        """One optimizer step as other runs have it, with a row for each answer, the most there can be."""
        return train.Config(batch_size=-(-self.answers // self.minibatches), microbatches=self.microbatches)


class Charge(NamedTuple):
    """What divergence from the reference costs, and how that adapts."""

    coef: float
    target: float | None = None  # nats an answer
    horizon: int = 10_000  # episodes
    stop: float | None = None  # nats a token between the policy and itself as it drew

    def check(self) -> "Charge":
        """Refuses a target that nothing can be held to."""
        if self.target is not None and not (self.target > 0 and self.coef > 0 and self.horizon > 0):
            raise RunError(
                f"ppo.kl_target is {self.target}, ppo.kl_coef {self.coef} and ppo.kl_horizon {self.horizon}; to hold a "
                "divergence all three must be above 0"
            )
        return self


class Rules(NamedTuple):
    """What becomes of rewards, and of answers that were cut for length."""

    judged: bool = False  # does a reward model judge as well?
    penalty: float | None = None  # taken off the reward of a cut answer
    silent: bool = False  # is a cut answer not learned from?


class Programs(NamedTuple):
    """What an iteration is computed with once answers are there, each compiled."""

    score: Callable[..., Judged]
    step: Step
    take: Callable[[Rollouts, np.ndarray, bool], Rollouts]  # some rows; is nothing learned yet?


class Told(NamedTuple):
    """What is known of an iteration when it is over."""

    figures: dict[str, float]
    rewards: Float[np.ndarray, "N"]
    tokens: int  # that were learned from, prompts included


def length_of_rows(config: Config, prompts: data.PromptRows, max_new_tokens: int, max_position: int) -> int:
    """The tokens of a row into which episodes are packed: by default those of the longest there can be, and a few more.

    Raises:
      RunError: an episode may become longer than a row, or than the model has positions.
    """
    longest_prompt = int(prompts.lengths.max())
    longest = longest_prompt + max_new_tokens
    if longest > max_position:
        raise RunError(
            f"the longest prompt has {longest_prompt} tokens; with {max_new_tokens} new ones that exceeds the model's "
            f"{max_position} positions. Lower rollout.max_new_tokens or data.max_length"
        )
    if config.row_length is not None and config.row_length < longest:
        raise RunError(f"train.row_length is {config.row_length}, and an episode may have {longest} tokens; raise it")
    return config.row_length or -(-longest // 16) * 16


def learn(
    objective: Objective,
    score: Callable[..., Judged],
    learner: Learner,
    prompts: data.PromptRows,
    *,
    act: Act,
    evaluate: Callable[[Mapping], Episodes] | None,
    rules: Rules,
    tokenizer: Any,
    row_length: int,
    charge: Charge,
    config: Config,
    optimizer: optim.Config,
    mesh: Mesh,
    folder: Path,
    recorded: Mapping[str, Any],
    show: int = 4,
) -> Learner:
    """Trains a policy on its own answers, from the last checkpoint in `folder` if it has one.

    Args:
      objective: over `Rollouts`, such as `objectives.policy`.
      score: makes them, such as `objectives.ppo_scoring` gives.
      learner: what learns; its trainable arrays are donated.
      prompts: to answer.
      act: draws answers and has them judged, see `actor.act`.
      evaluate: policy -> judged answers to held-out prompts; None for no evaluation.
      rules: what becomes of rewards and of cut answers.
      tokenizer: of the run.
      row_length: see `length_of_rows`.
      charge: what divergence costs.
      config, optimizer: how long, in what pieces, with what updates.
      mesh: where it runs.
      folder: takes metrics.jsonl, samples.jsonl and checkpoints/.
      recorded: the whole configuration of the run by dotted key; a checkpoint of another one is refused.
      show: answers that are printed at each evaluation.

    Returns:
      the learner, with what it has learned.

    Raises:
      RunError: a contradicting checkpoint; no answer that has a reward; a loss that is not finite.
      Stopped: the process was told to end, see `hosts.notice`; the state was saved after the iteration it was in.
      ValueError: rows that the mesh cannot cut.
    """
    c, frozen = config, learner.frozen
    sharding.check_length(row_length, mesh)
    tx, rate = optim.build(optimizer, c.iterations * c.epochs * c.minibatches)
    state = init(learner.trainable, tx, jax.random.key(c.seed), mesh)
    step = make_step(objective, tx, microbatches=c.microbatches, shardings=sharding.of(state))
    programs = Programs(jax.jit(score), step, _taker(mesh))
    manager = checkpoint.open_folder(folder / "checkpoints", c.keep)
    at = Position(0, charge.coef, None)
    try:
        if found := checkpoint.restore(manager, state, recorded):
            state, at = found[0], Position(**found[1])
        log = Log(folder, at.iteration, shows="reward")
        if log.writes:
            keep_until(folder / SAMPLES, at.iteration)
        known: set[str] = set()  # reward functions of which a failure was printed

        def look() -> None:
            if evaluate is not None:
                held = evaluate(policy_of(tree.combine(state.trainable, frozen)))
                log.evaluation(at.iteration, {"reward": float(np.nanmean(held.scored.total)), **actor.figures(held)})
                _complain(folder, at.iteration, held, known)
                _record(folder, at.iteration, "held out", held, held.scored.total, show)

        if not at.iteration:
            look()
        batches = data.batches_by_length(prompts, c.prompts, seed=c.seed, epochs=None, position=at.prompts)
        with log.progress(c.iterations), hosts.notice() as told_to_end:
            for batch in itertools.islice(batches, c.iterations - at.iteration):
                number = at.iteration + 1
                key = jax.random.fold_in(jax.random.key(c.seed), number)
                asked = actor.ask(prompts, actor.taken(batch.tokens.rows), tokenizer)
                policy = policy_of(tree.combine(state.trainable, frozen))
                episodes = act(policy, asked, samples=c.samples, key=key)
                _complain(folder, number, episodes, known)
                packed = pack(episodes, row_length, c, mesh)
                charged = charge._replace(coef=at.kl_coef)
                state, told = improve(programs, state, frozen, episodes, packed, rules, charged, c, mesh, number)
                rates = {"kl_coef": at.kl_coef, "learning_rate": float(rate(int(state.step) - 1))}
                at = Position(number, _adapt(charge, at.kl_coef, told, len(told.rewards)), dict(batch.position))
                _check(number, told.figures)
                log.train(number, told.figures | rates, told.tokens)
                last = number == c.iterations
                stop = None if last else told_to_end(number)
                if last or (c.eval_every and number % c.eval_every == 0 and not stop):
                    _record(folder, number, "drawn", episodes, told.rewards, show)
                    look()
                if last or stop or (c.save_every and number % c.save_every == 0):
                    checkpoint.save(manager, state, at._asdict(), recorded)
                if stop := told_to_end(number) if last else stop:
                    raise Stopped(stop, number, "iteration")
        return learner._replace(trainable=state.trainable)
    finally:
        checkpoint.close(manager)


class Position(NamedTuple):
    """Where a run stands; with the state, all that a checkpoint holds. JSON."""

    iteration: int
    kl_coef: float
    prompts: dict[str, Any] | None  # the position in the data, after the last batch


def pack(episodes: Episodes, length: int, config: Config, mesh: Mesh) -> rollouts.Packed:
    """Packs episodes into rows that minibatches, microbatches and devices can share out."""
    unit = config.minibatches * config.microbatches * axes.rows(mesh)
    return rollouts.pack(episodes.asked.ids, episodes.tokens, length=length, unit=unit)


def improve(
    programs: Programs,
    state: State,
    frozen: Tree,
    episodes: Episodes,
    packed: rollouts.Packed,
    rules: Rules,
    charge: Charge,
    config: Config,
    mesh: Mesh,
    number: int,
) -> tuple[State, Told]:
    """Learns from the answers of one iteration.

    Args:
      programs: compiled.
      state: donated.
      frozen: the variables that do not train.
      episodes, packed: what was drawn, as text and as rows.
      rules: what becomes of rewards and of cut answers.
      charge: what divergence costs now.
      config: how many epochs, minibatches.
      mesh: where it runs.
      number: of the iteration; with the seed it decides the minibatches.

    Returns:
      (state, told); told has means over the steps that had something to learn.
    """
    started = perf_counter()
    given = actor.given(episodes, penalty=rules.penalty, judged=rules.judged)
    silent = np.isnan(given) | (rules.silent & ~episodes.ended)
    placed, variables = rollouts.place(packed, mesh), tree.combine(state.trainable, frozen)
    judged = programs.score(variables, *placed, given, silent, np.float32(charge.coef))
    steps = []
    for epoch in range(config.epochs):
        draw = np.random.default_rng([config.seed, number, epoch])
        for rows in rollouts.minibatches(draw, packed, config.minibatches):
            state, metrics = programs.step(state, frozen, programs.take(judged.rollouts, rows, not steps))
            steps.append(metrics)
        if charge.stop is not None and float(steps[-1]["drift"]) > charge.stop:
            break
    found, (told, reached) = sharding.to_host(judged.rewards), jax.device_get((judged.metrics, steps))
    taught = [one for one in reached if one["trained_tokens"]] or reached  # a minibatch may have nothing to learn
    means = {name: float(np.mean([one[name] for one in taught])) for name in reached[0]}
    seconds, read = perf_counter() - started, int((packed.tokens.segments > 0).sum())
    figures = {
        "loss": means.pop("loss"),
        "reward": float(np.nanmean(found)),
        "reward_spread": float(np.nanstd(found)),
        **actor.figures(episodes),
        **{name: float(value) for name, value in told.items()},
        **means,
        "trained_tokens": int(episodes.samples.lengths[~silent].sum()),  # of a step it is what its loss is a mean over
        "updates": len(steps),
        "rollout_seconds": episodes.seconds,
        "update_seconds": seconds,
        "rollout_tokens_per_second": round(int(episodes.samples.lengths.sum()) / episodes.seconds, 1),
        "update_tokens_per_second": round(read * len(steps) / config.minibatches / seconds, 1),
    }
    return state, Told(figures, found, read)


def _taker(mesh: Mesh) -> Callable[[Rollouts, np.ndarray, bool], Rollouts]:
    """Compiles the choice of a minibatch."""

    @jax.jit
    def some(rows: Rollouts, chosen: np.ndarray) -> Rollouts:
        pick = lambda x, where: jax.lax.with_sharding_constraint(x[chosen], where)
        return jax.tree.map(pick, rows, sharding.batch(rows, mesh))

    def take(rows: Rollouts, chosen: np.ndarray, fresh: bool) -> Rollouts:
        found = some(rows, chosen)
        return found._replace(fresh=found.fresh | fresh)

    return take


def _adapt(charge: Charge, coef: float, told: Told, episodes: int) -> float:
    if charge.target is None:
        return coef
    return float(
        losses.adapt(coef, told.figures["kl_answer"], target=charge.target, horizon=charge.horizon, steps=episodes)
    )


def _check(iteration: int, figures: Mapping[str, float]) -> None:
    if not math.isfinite(figures["loss"] + figures["grad_norm"]):
        raise RunError(
            f"iteration {iteration}: loss {figures['loss']}, gradient norm {figures['grad_norm']}. Nothing was saved "
            f"since the last good checkpoint. Lower optim.learning_rate, look at {SAMPLES}"
        )


def _record(folder: Path, step: int, kind: str, episodes: Episodes, found: Float[np.ndarray, "N"], show: int) -> None:
    """Writes answers to samples.jsonl, and prints some."""
    if jax.process_index():
        return
    rows = actor.lines(episodes, found)
    rows = rows if kind == "held out" else rows[:: max(1, len(rows) // max(1, show))][:show]
    _write(folder, step, kind, rows)
    some = [rows[i] for i in np.unique(np.linspace(0, len(rows) - 1, min(show, len(rows))).astype(int))]
    cell = lambda value: "none" if value is None else f"{value:.3f}"
    shown = [(row["prompt"], row["answer"], cell(row["reward"])) for row in some]
    if shown:
        report.table(f"iteration {step}, {kind}", ("prompt", "answer", "reward"), shown, lines=False)


def _complain(folder: Path, step: int, episodes: Episodes, known: set[str]) -> None:
    """Writes what reward functions could not judge to samples.jsonl, and prints the first failure of each."""
    if jax.process_index():
        return
    rows = actor.failed(episodes)
    _write(folder, step, "failed", rows)
    new = {row["function"]: row for row in reversed(rows) if row["function"] not in known}
    known |= set(new)
    if new:
        columns = ("function", "error", "prompt", "answer")
        cells = [tuple(row[name] for name in columns) for row in new.values()]
        report.table(f"iteration {step}: {len(rows)} rewards failed, all of them in {SAMPLES}", columns, cells)


def _write(folder: Path, step: int, kind: str, rows: Sequence[Mapping[str, Any]]) -> None:
    with (folder / SAMPLES).open("a", encoding="utf-8") as file:
        file.writelines(json.dumps({"step": step, "kind": kind, **row}, ensure_ascii=False) + "\n" for row in rows)


def before_and_after(folder: Path, count: int) -> list[tuple[str, str, str, str]]:
    """Some held-out prompts with what was wanted and the answers of the first and last evaluation, of samples.jsonl."""
    rows = [row for row in read_metrics(folder / SAMPLES) if row["kind"] == "held out"]
    steps = [row["step"] for row in rows] or [0]
    first, last = ([row for row in rows if row["step"] == end] for end in (min(steps), max(steps)))
    before = {row["prompt"]: row["answer"] for row in first}  # a run may go on with other held-out prompts
    both = [row for row in last if row["prompt"] in before]
    some = np.unique(np.linspace(0, len(both) - 1, min(count, len(both))).astype(int))
    return [(r["prompt"], r.get("wanted", ""), before[r["prompt"]], r["answer"]) for r in (both[i] for i in some)]
