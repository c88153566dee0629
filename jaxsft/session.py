"""What every training script does: open a run, load what learns, learn it.

A script says what is learned of which rows, and in what words that is told to people; the rest is here.
"""

import dataclasses
import functools
import hashlib
import itertools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from jaxsft import axes, checkpoint, data, hub, objectives, optim, report, run, score, sharding, tree, tuning
from jaxsft.models import Model, VisionConfig, build
from jaxsft.objectives import Objective
from jaxsft.run import Log, RunError
from jaxsft.train import Config, Prepare, fit, init, make_evaluation, make_step, place
from jaxsft.tree import Tree
from jaxsft.tuning import Learner
from jaxsft.types import State

Rows = data.PackedRows | data.PackedPairs | data.ContrastRows | data.images.ImageRows
VERSION = 1  # of what is computed of a reference; another one is computed again
AGREE = 0.5  # nats an answer, on average, by which two computations of a reference may differ: other devices, bfloat16


def start(
    config: run.Config, mesh: sharding.Config, how: Config | None = None, length: int | None = None
) -> tuple[Path, Mesh]:
    """Prepares the run's folder and the devices, in that order: several hosts meet before they see each other's.

    Args:
      config: of the run.
      mesh: of the devices.
      how: the batches, which the devices must be able to share out; None where that is not settled yet.
      length: tokens of a row, likewise; 1 where rows are none of tokens.

    Raises:
      RunError, ValueError: see `run.start`, `sharding.mesh`; a batch that the mesh cannot share out.
    """
    folder = run.start(config)
    made = sharding.mesh(**dataclasses.asdict(mesh))
    if how is not None:
        check_batch(how, made)
    if length is not None:
        sharding.check_length(length, made)
    return folder, made


def check_batch(config: Config, mesh: Mesh) -> None:
    """Refuses a batch that the mesh and the microbatches cannot share out."""
    if config.batch_size % (axes.rows(mesh) * config.microbatches):
        raise RunError(
            f"train.batch_size is {config.batch_size}; it must divide by microbatches x data x fsdp x expert = "
            + " x ".join(str(n) for n in (config.microbatches, *(mesh.shape[axis] for axis in axes.ROWS)))
        )


def load_tokenizer(model: hub.Config, template: str) -> tuple[Any, hub.Vocabulary | None]:
    """Loads a checkpoint's tokenizer with the run's new tokens and chat template, and tells the rows that they need.

    Raises:
      CheckpointError, DataError: see `hub.load_vocabulary`, `data.with_template`.
    """
    new = {"special": model.new_special_tokens, "multiple": model.vocab_multiple}
    tokenizer, vocabulary = hub.load_vocabulary(model.path, model.new_tokens, **new)
    return data.with_template(tokenizer, template), vocabulary


def load(
    model: hub.Config,
    how: tuning.Config,
    mesh: Mesh,
    *,
    seed: int,
    labels: int | None = None,
    head: bool = True,
    vocabulary: hub.Vocabulary | None = None,
) -> Learner:
    """Loads a checkpoint, and splits its variables by what learns.

    Args:
      model: which, and in what precision.
      how: what learns.
      mesh: where it lies.
      seed: draws the adapter.
      labels: 1 for a reward model, whose score trains whatever else does, the number of classes for a model of images,
        likewise its classifier; see `hub.load_variables`.
      head: False for the hidden states alone.
      vocabulary: of new tokens, whose tables train whatever else does.

    Raises:
      CheckpointError, ValueError: see `hub.load_variables`, `tuning.plan`, `tuning.apply`.
    """
    family, shape = hub.read_config(hub.resolve(model.path), labels)
    images = isinstance(shape, VisionConfig)
    also = tuning.always(labels=labels, new_tokens=vocabulary is not None, images=images)
    plan = tuning.plan(how, shape.layers, also=also)
    key_score, key_lora = jax.random.split(jax.random.key(seed)) if labels else (None, jax.random.key(seed))
    loaded, base = hub.load_variables(
        model.path,
        mesh,
        quantise=model.quantise,
        dtype=jnp.dtype(model.dtype),
        full_precision=plan.trainable,
        cut=plan.cut,
        remat=model.remat,
        attention=model.attention,
        lora_dropout=plan.lora.dropout if plan.lora else 0.0,
        labels=labels,
        key=key_score,
        head=head,
        vocabulary=vocabulary,
    )
    trainable, frozen = tuning.apply(plan, base, key_lora, mesh=mesh, rules=family.rules)
    added = vocabulary.lines() if vocabulary else {}
    report.summary("model", tuning.describe(plan, trainable, frozen) | _attention(loaded) | added)
    return Learner(loaded, plan, trainable, frozen)


def draw(
    model: hub.Config,
    mesh: Mesh,
    *,
    seed: int,
    labels: int | None = None,
    vocabulary: hub.Vocabulary | None = None,
) -> Learner:
    """Makes a model of the shape that config.json describes, with random weights that all learn."""
    kind = {"dtype": jnp.dtype(model.dtype), "remat": model.remat, "attention": model.attention}
    kind |= {"labels": labels, "vocabulary": vocabulary}
    made, params = hub.init(model.path, jax.random.key(seed), mesh, **kind)
    plan = tuning.plan(tuning.Config(method="full"), made.config.layers)
    report.summary("model", tuning.describe(plan, {"params": params}, {}) | _attention(made))
    return Learner(made, plan, {"params": params}, {})


def _attention(model: Model) -> dict[str, str]:
    return {"attention": model.attention} if model.attention else {}


def with_reference(learner: Learner) -> Learner:
    """Keeps what the base's own parameters are before they train, for a reference that is run beside the policy.

    With an adapter alone there is nothing to keep: the reference is the base without it.
    """
    kept = _before(learner)
    return learner._replace(frozen={**learner.frozen, "reference": kept}) if kept else learner


def _before(learner: Learner) -> Tree:
    """What the base's own parameters that train are now: a copy, since training is given them to keep."""
    return learner.frozen.get("reference") or jax.tree.map(jnp.copy, learner.trainable.get("params", {}))


def with_critic(learner: Learner, kind: Literal["own", "shared"], mesh: Mesh) -> Learner:
    """Gives a policy a critic, `variables["value"]`: a score that begins at 0, on features of its own or of the policy.

    Args:
      learner: the policy, as it is before training.
      kind: own: a copy of what trains (with LoRA a second adapter over the same base) and a score; shared: a score.
      mesh: where it lies.
    """
    zeros = jax.device_put(jnp.zeros((learner.model.config.hidden, 1), jnp.float32), sharding.whole(mesh))
    trains, constants = objectives.critic(learner.trainable, learner.frozen, zeros, shared=kind == "shared")
    trainable = {**learner.trainable, "value": jax.tree.map(jnp.copy, trains)}
    return learner._replace(trainable=trainable, frozen={**learner.frozen, "value": constants})


def with_judge(learner: Learner, path: str, model: hub.Config, mesh: Mesh) -> tuple[Learner, Model | None]:
    """Gives a run a reward model, `variables["reward"]`; none where there is no path.

    Args:
      learner: the policy.
      path: what scripts/reward.py leaves: an adapter, which is put on the base that the policy has, too, as it was
        before training; or a merged checkpoint, whole.
      model: the policy's checkpoint.
      mesh: where it lies.

    Returns:
      (learner, the model that computes the scores, or None).

    Raises:
      RunError: it reads other tokens than the policy writes, or scores nothing.
      CheckpointError: see `hub.load_adapter`, `hub.load_variables`.
    """
    if not path:
        return learner, None
    if (Path(path) / "adapter_config.json").is_file():
        family, shape = hub.read_config(hub.resolve(model.path))
        base = hub.on_disk(model.path, cut=learner.plan.cut)
        adapter = hub.load_adapter(path, base, family=family, config=shape)
        own = {"lora": adapter.lora, "params": adapter.params}
        judge = build(dataclasses.replace(learner.model.config, labels=1), dtype=jnp.dtype(model.dtype), mesh=mesh)
        tokenizer = hub.adapter_tokenizer(path, model.path)
        own = jax.tree.map(lambda x: jax.device_put(x, sharding.whole(mesh)), own)
        own["params"] = tree.nest(tree.flat(_before(learner)) | tree.flat(own["params"]))
    else:
        judge, own = hub.load_variables(path, mesh, dtype=jnp.dtype(model.dtype))
        tokenizer = hub.load_tokenizer(path)
    if "score" not in own["params"]:
        raise RunError(f"reward.model {path} is no reward model: it has no score; train one with scripts/reward.py")
    if tokenizer.get_vocab() != hub.load_tokenizer(model.path).get_vocab():
        raise RunError(
            f"reward.model {path} has another vocabulary than {model.path}; train it from the same checkpoint, or call "
            "it in a reward function"
        )
    return learner._replace(frozen={**learner.frozen, "reward": own}), judge


def scorer(learner: Learner, judge: Model | None) -> Callable[[Sequence[Sequence[int]]], list[float]] | None:
    """Makes texts as token ids -> their scores by the run's reward model; None where there is none."""
    if judge is None:
        return None
    variables = objectives.seen_as(learner.variables, "reward")
    return lambda texts: score.texts(judge, variables, texts)


def measure(
    each: Callable[[Mapping, Any], Mapping[str, jax.Array]], rows: data.PackedPairs, *, batch_size: int, mesh: Mesh
) -> Callable[..., dict[str, np.ndarray]]:
    """Compiles the measurement of single pairs.

    Args:
      each: (variables, batch) -> values [B, K] by name, such as `Pairwise.each`.
      rows: the pairs.
      batch_size: rows at one time.
      mesh: where it runs.

    Returns:
      (learner, batches=None) -> values by name, in the order of the pairs in the data, whose numbers are `row`; of all
      rows, or of the first few batches.
    """
    compute = jax.jit(
        lambda trainable, frozen, batch: {"row": batch.row, **each(tree.combine(trainable, frozen), batch)}
    )
    process, processes = sharding.share(mesh)
    share = functools.partial(data.batches, process=process, processes=processes)

    def run(learner: Learner, batches: int | None = None) -> dict[str, np.ndarray]:
        placed = itertools.islice(place(share(rows, batch_size, seed=None, epochs=1), mesh), batches)
        parts = [_gathered(compute(learner.trainable, learner.frozen, one.batch)) for one in placed]
        joined = {name: np.concatenate([part[name].ravel() for part in parts]) for name in parts[0]}
        order = np.argsort(joined["row"], kind="stable")
        order = order[joined["row"][order] >= 0]
        return {name: values[order] for name, values in joined.items()}

    return run


def _gathered(arrays: dict[str, jax.Array]) -> dict[str, np.ndarray]:
    """Arrays that lie over several hosts, whole on each of them."""
    if jax.process_count() == 1:
        return jax.device_get(arrays)
    return {name: np.asarray(multihost_utils.process_allgather(x, tiled=True)) for name, x in arrays.items()}


def precompute(
    said: Callable[[Mapping, Any], Mapping[str, jax.Array]],
    learner: Learner,
    rows: data.PackedPairs,
    *,
    batch_size: int,
    mesh: Mesh,
    cache: Path,
    model: hub.Config,
    detail: str = "",
) -> data.PackedPairs:
    """Runs the reference over all pairs once, so that training need not; what was computed is kept by content.

    The file's name is a digest of the rows, the checkpoint, and of everything else that decides what the reference says
    of them. When it is found, the first batch is computed again all the same, and must agree.

    Args:
      said: (variables, batch) -> {"chosen", "rejected"}, log-probabilities [B, K], such as `objectives.said`.
      learner: the model as it is before training.
      rows: packed pairs.
      batch_size: rows at one time.
      mesh: where it runs.
      cache: the folder for such files; several hosts each compute anew.
      model: the checkpoint, and its precision.
      detail: what else `said` depends on.

    Returns:
      the rows, with what the reference says of each pair.

    Raises:
      RunError: a file that was found says something else than the model does; the folder cannot be written.
    """
    decides = [VERSION, rows.digest, hub.digest(hub.resolve(model.path)), model.dtype, model.quantise, detail]
    decides += [learner.plan.trainable, learner.model.config.vocab_size]  # what trains is float32; new rows
    name = hashlib.blake2b(repr(decides).encode(), digest_size=16).hexdigest()
    file, known = cache / f"reference-{name}.npy", jax.process_count() == 1
    reference = Learner(learner.model, learner.plan, {}, objectives.reference(learner.variables))
    compute = measure(said, rows, batch_size=batch_size, mesh=mesh)
    if known and file.exists():
        some, off = compute(reference, batches=1), np.inf
        try:
            found = np.load(file, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise RunError(f"{file} cannot be read ({error}); delete it") from error
        if found.shape == rows.documents.shape:
            off = np.abs(found[some["row"]] - np.stack([some["chosen"], some["rejected"]], axis=1)).mean()
        if not off < AGREE:
            raise RunError(f"{file} is not what the reference says, by {off:.3g} nats an answer; delete it")
        return rows.with_reference(found, name)
    values = compute(reference)
    found = np.zeros(rows.documents.shape, np.float32)
    found[values["row"]] = np.stack([values["chosen"], values["rejected"]], axis=1)
    rows = rows.with_reference(found, name)  # refuses what is not finite
    if known:
        part = file.with_suffix(f".{os.getpid()}.part")
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as stream:
                np.save(stream, found, allow_pickle=False)
            os.replace(part, file)
        except OSError as error:
            raise RunError(f"data.cache {cache} cannot be written ({error.strerror}); name another folder") from error
    return rows


def _expect_tokens(learner: Learner, *rows: Any) -> None:
    """Refuses tokens that the model does not have."""
    if (table := tree.flat(learner.variables).get("params/embed/table")) is not None:
        data.expect_tokens([source for one in rows if one for source in one.sources], len(table))


def learn(
    objective: Objective,
    learner: Learner,
    rows: Rows,
    held_out: Rows | None,
    *,
    prepare: Prepare | None = None,
    config: Config,
    optimizer: optim.Config,
    mesh: Mesh,
    folder: Path,
    recorded: Mapping[str, Any],
) -> Learner:
    """Trains on rows, from the last checkpoint in `folder` if it has one.

    Args:
      objective: (variables, batch, key) -> Sums.
      learner: what learns; its trainable arrays are donated.
      rows: packed rows, or images, to learn.
      held_out: those to measure on, or None.
      prepare: see `train.make_step`.
      config, optimizer: how long, in what pieces, with what updates.
      mesh: where it runs.
      folder: takes metrics.jsonl and checkpoints/.
      recorded: the whole configuration of the run by dotted key; a checkpoint of another one is refused.

    Returns:
      the learner, with what it has learned.

    Raises:
      RunError, Stopped: see `fit`; a contradicting checkpoint; a batch that the mesh cannot share out.
      DataError: a token that the model does not have.
    """
    c = config
    check_batch(c, mesh)
    if isinstance(rows, data.images.ImageRows):
        batches, unit = data.images.batches, "images"
    else:
        batches, unit = data.batches, "tokens"
        _expect_tokens(learner, rows, held_out)
    steps = c.max_steps or math.ceil(c.epochs * len(rows) / c.batch_size)
    whole = None if c.max_steps or c.epochs % 1 else int(c.epochs)  # whole epochs end with a padded batch
    tx, rate = optim.build(optimizer, steps)
    frozen = learner.frozen
    state = init(learner.trainable, tx, jax.random.key(c.seed), mesh)
    step = make_step(objective, tx, prepare=prepare, microbatches=c.microbatches, shardings=sharding.of(state))
    measure = make_evaluation(objective)
    process, processes = sharding.share(mesh)
    share: Any = functools.partial(batches, process=process, processes=processes)

    def evaluate(state: State) -> Mapping[str, float]:
        held = share(held_out or rows, c.batch_size, seed=None, epochs=1)
        return measure(state.trainable, frozen, place(held, mesh))

    manager = checkpoint.open_folder(folder / "checkpoints", c.keep)
    position = None
    try:
        if found := checkpoint.restore(manager, state, recorded):
            state, position = found
        log = Log(folder, int(state.step), unit=unit)
        if held_out is not None and position is None:
            log.evaluation(0, evaluate(state))
        state = fit(
            step,
            state,
            frozen,
            place(share(rows, c.batch_size, seed=c.seed, epochs=whole, position=position), mesh),
            steps=steps,
            log=log,
            rate=rate,
            evaluate=None if held_out is None else evaluate,
            save=lambda state, position: checkpoint.save(manager, state, position, recorded),
            eval_every=c.eval_every,
            save_every=c.save_every,
            log_every=c.log_every,
        )
        return learner._replace(trainable=state.trainable)
    finally:
        checkpoint.close(manager)
