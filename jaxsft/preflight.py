"""Pre-flight: what a run needs of each device, as the compiler sees it, before any weight is read.

The step is compiled for arrays that do not exist, of the shapes and shardings that the run would have, and XLA's own
`memory_analysis` says what it takes. Where that does not fit, single changes are compiled likewise. The mesh may have
more devices than this machine: CPU devices then stand for them.

On a CPU XLA computes bfloat16 in float32, and orders its loops to its own liking: what it says of working memory is
near what a GPU or TPU takes, not equal to it. On the machine of the run the figures are those of the run.
"""

import contextlib
import dataclasses
import math
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jaxsft import axes, hub, losses, narrow, optim, report, sample, sharding, train, tree, tuning
from jaxsft.losses import Chunk
from jaxsft.models import Model, ModelConfig, VisionConfig
from jaxsft.objectives import Objective, Pairwise, critic, policy
from jaxsft.tree import Tree
from jaxsft.types import Images, Pairs, Rollouts, State, Tokens

# On a CPU alone: else the float32 copy of a bfloat16 kernel is made of all layers at once, before the loop over them.
AS_ELSEWHERE = {"xla_disable_hlo_passes": "while-loop-invariant-code-motion,while-loop-expensive-invariant-code-motion"}


class Sections(NamedTuple):
    """The parts of a run's configuration that decide how much memory it takes."""

    model: hub.Config
    tuning: tuning.Config
    optim: optim.Config
    train: train.Config
    mesh: sharding.Config
    length: int  # tokens of a row


class Work(NamedTuple):
    """What a run computes, without its model."""

    objective: Callable[[Model, Chunk | None], tuple[Objective, train.Prepare | None]]  # for make_step
    batch: Callable[
        [Callable[..., Any]], Any
    ]  # rows -> a batch; rows(dtype) is [B, T], rows(dtype, *axes) is [B, *axes]
    reference: bool = False  # is what trains of the base kept as it was, beside it?
    labels: int = 0  # of a reward model
    critic: str = ""  # of PPO, see `session.with_critic`
    answers: int = 0  # in progress at one time


def over_tokens(objective: Callable[..., Objective]) -> Work:
    """Work over `Tokens`; objective: (model, chunk=...) -> objective, such as `objectives.supervised`."""
    kinds = (jnp.int32, jnp.bool_, jnp.int32, jnp.int32)
    return Work(lambda model, chunk: (objective(model, chunk=chunk), None), lambda rows: Tokens(*map(rows, kinds)))


PAIRS = 8  # in a row; how many there are is not known before the data is read, and matters little


def over_pairs(learning: Callable[..., Pairwise], *, reference: bool = False, labels: int = 0) -> Work:
    """Work over `Pairs`; learning: (model, chunk=...) -> Pairwise, such as `objectives.of` gives."""

    def batch(rows: Callable[..., Any]) -> Pairs:
        tokens = Tokens(*map(rows, (jnp.int32, jnp.bool_, jnp.int32, jnp.int32)))
        each = lambda dtype, *more: rows(dtype, PAIRS, *more)
        return Pairs(*tokens, each(jnp.float32), each(jnp.bool_), each(jnp.int32), each(jnp.float32, 2))

    return Work(lambda model, chunk: learning(model, chunk=chunk)[:2], batch, reference, labels)


def over_rollouts(learning: Mapping[str, Any], *, answers: int, critic: str = "", reference: bool = False) -> Work:
    """Work over `Rollouts`.

    Args:
      learning: of `objectives.policy`.
      answers: of a rollout.
      critic: see `session.with_critic`; "" for none.
      reference: is there one?
    """

    def batch(rows: Callable[..., Any]) -> Rollouts:
        tokens = Tokens(*map(rows, (jnp.int32, jnp.bool_, jnp.int32, jnp.int32)))
        old, reference, advantage, value, returns = (rows(jnp.float32) for _ in range(5))
        return Rollouts(*tokens, old, reference, advantage, value, returns, rows(jnp.bool_, 1))

    objective = lambda model, chunk: (policy(model, **learning, chunk=chunk), None)
    return Work(objective, batch, reference, critic=critic, answers=min(answers, sample.SLOTS))


def over_images(learning: Callable[..., Any], *, labels: int, size: tuple[int, int]) -> Work:
    """Work over `Images`.

    Args:
      learning: model -> `objectives.Classification`.
      labels: the number of classes.
      size: height and width of the images.
    """

    def batch(rows: Callable[..., Any]) -> Images:
        column = lambda dtype: rows(dtype, 1)
        pixels = rows(jnp.uint8, *size, 3)
        return Images(pixels, column(jnp.int32), column(jnp.int32), column(jnp.uint32))

    return Work(lambda model, chunk: learning(model)[:2], batch, labels=labels)


class Need(NamedTuple):
    """Bytes on one device, and parameters in all."""

    weights: int
    optimizer: int
    batch: int
    working: int  # activations, gradients and what else comes and goes within a step
    cache: int  # of the answers in progress, while no step is computed
    logits: int  # of `working`: the float32 scores of the tokens that meet the output layer at one time
    parameters: int
    trained: int

    @property
    def total(self) -> int:
        return self.weights + self.optimizer + max(self.batch + self.working, self.cache)


def pretend(mesh: sharding.Config) -> None:
    """Makes as many CPU devices as `mesh` names, where it names them all and nothing has asked jax for devices yet."""
    with contextlib.suppress(RuntimeError):  # they exist already; `sharding.mesh` says whether they suffice
        if count := _count(mesh):
            jax.config.update("jax_num_cpu_devices", count)


def _count(mesh: sharding.Config) -> int:
    """The devices that a mesh names; 0 where it takes what there is."""
    lengths = [getattr(mesh, axis) for axis in axes.ALL]
    return math.prod(lengths) if min(lengths) > 0 else 0


def _mesh(config: sharding.Config) -> tuple[Mesh, bool]:
    """The mesh, and whether CPU devices stand for others."""
    count, given = _count(config), dataclasses.asdict(config)
    if count and count != len(jax.devices()):
        return sharding.mesh(**given, devices=jax.devices("cpu")[:count]), True
    return sharding.mesh(**given), bool(count) and count > 1 and jax.default_backend() == "cpu"


def abstract_state(trainable: Tree, tx: optax.GradientTransformation, mesh: Mesh) -> State:
    """`train.init` of arrays that do not exist; moments lie as the weights they belong to.

    Args:
      trainable: shapes with shardings.
      tx: an Optax transformation.
      mesh: where it would run.
    """
    placed = lambda x, where=None: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where or sharding.whole(mesh))
    moments: Any = optax.tree.map_params(
        tx,
        lambda x, like: placed(x, like.sharding),
        jax.eval_shape(tx.init, trainable),
        trainable,
        transform_non_params=placed,
    )
    scalar: Any = placed(jax.ShapeDtypeStruct((), jnp.int32))
    key: Any = placed(jax.eval_shape(lambda: jax.random.key(0)))
    return State(scalar, trainable, moments, key)


def bytes_of(arrays: Any) -> int:
    """Bytes on one device of shapes with shardings.

    Example:
      >>> one = sharding.whole(sharding.mesh(devices=jax.devices()[:1]))
      >>> bytes_of({"w": jax.ShapeDtypeStruct((4, 2), jnp.float32, sharding=one)})
      32
    """
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(arrays))


class Program(NamedTuple):
    """The step of a run, compiled for arrays that do not exist, and those."""

    compiled: Any  # jax.stages.Compiled
    model: Model
    state: State
    frozen: Tree
    batch: Any
    cache: Any  # of answers in progress
    mesh: Mesh
    tokens: int  # of a batch
    chunk: losses.Chunk  # of those that meet the output layer at one time, and of the vocabulary


def compiled(work: Work, sections: Sections) -> Program:
    """Compiles the step of a run.

    Args:
      work: what it computes.
      sections: of the run's configuration.

    Raises:
      CheckpointError, ValueError: config.json or the sections cannot be used.
    """
    s, (mesh, stands_in) = sections, _mesh(sections.mesh)
    sharding.check_length(s.length, mesh)
    family, shape = hub.read_config(hub.resolve(s.model.path), work.labels or None)
    new, vocabulary = {"tokens": s.model.new_tokens, "special": s.model.new_special_tokens}, None
    if any(new.values()):
        _, vocabulary = hub.load_vocabulary(s.model.path, **new, multiple=s.model.vocab_multiple)
    images = isinstance(shape, VisionConfig)
    also = tuning.always(labels=work.labels, new_tokens=vocabulary is not None, images=images)
    plan = tuning.plan(s.tuning, shape.layers, also=also)
    model, base = hub.abstract(
        s.model.path,
        mesh,
        dtype=jnp.dtype(s.model.dtype),
        remat=s.model.remat,
        attention=s.model.attention,
        full_precision=plan.trainable,
        cut=plan.cut,
        lora_dropout=plan.lora.dropout if plan.lora else 0.0,
        quantise=s.model.quantise,
        labels=work.labels or None,
        vocabulary=vocabulary,
    )
    trainable, frozen = tuning.apply(plan, base, jax.random.key(0), mesh=mesh, rules=family.rules)
    if work.reference and "params" in trainable:
        frozen = {**frozen, "reference": trainable["params"]}
    if work.critic:
        score = jax.ShapeDtypeStruct((shape.hidden, 1), jnp.float32, sharding=sharding.whole(mesh))
        trains, constants = critic(trainable, frozen, score, shared=work.critic == "shared")
        trainable, frozen = {**trainable, "value": trains}, {**frozen, "value": constants}
    cache: Any = jax.eval_shape(lambda: model.cache(work.answers, s.length)) if work.answers else ()
    tx, _ = optim.build(s.optim, 1)
    state = abstract_state(trainable, tx, mesh)

    pieces = axes.rows(mesh) * s.train.microbatches
    # Of answers there are as many rows as they fill, so rows without any are added until they can be shared out.
    count = -(-s.train.batch_size // pieces) * pieces if work.answers else s.train.batch_size

    def rows(dtype: Any, *axes: int) -> Any:
        return jax.ShapeDtypeStruct((count, *(axes or (s.length,))), dtype)

    batch = work.batch(rows)
    place = lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
    batch = jax.tree.map(place, batch, sharding.batch(batch, mesh))
    chunk = losses.CHUNK if stands_in else None
    objective, prepare = work.objective(model, chunk)
    cut = {"microbatches": s.train.microbatches, "shardings": sharding.of(state)}
    step: Any = train.make_step(objective, tx, prepare=prepare, **cut)
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    with narrow.stands_in(stands_in):
        made = step.lower(state, frozen, batch).compile(AS_ELSEWHERE if on_cpu else None)
    at_once = chunk or (losses.CHUNK_CPU if on_cpu else losses.CHUNK)
    return Program(made, model, state, frozen, batch, cache, mesh, count * s.length, at_once)


def measure(work: Work, sections: Sections) -> Need:
    """Compiles the step of a run and asks what it takes; arguments as for `compiled`."""
    step = compiled(work, sections)
    found, trainable = step.compiled.memory_analysis(), step.state.trainable
    weights, moments, tokens = map(bytes_of, ((trainable, step.frozen), step.state.opt_state, step.batch))
    extra = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    return Need(
        weights,
        moments,
        tokens,
        max(0, extra - weights - moments - tokens) + found.temp_size_in_bytes,
        sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(step.cache)) // step.mesh.size,
        _scores(step.chunk, step.tokens, _width(step.model.config), step.mesh),
        tuning.count(trainable, step.frozen),
        tree.count(trainable),
    )


def _scores(chunk: Chunk, tokens: int, width: int, mesh: Mesh) -> int:
    """Bytes of the scores that exist at one time on a device: of its tokens, for its rows of the output layer."""
    own = tokens // (axes.rows(mesh) * mesh.shape[axes.CONTEXT])
    return 4 * min(chunk.tokens, own) * min(chunk.vocabulary, width // mesh.shape[axes.TENSOR])


def _width(config: ModelConfig) -> int:
    """Scores that the output layer makes of one token, or image."""
    return config.labels if isinstance(config, VisionConfig) else config.vocab_size


def changes(sections: Sections) -> dict[str, Sections]:
    """Single changes of a configuration that save memory, by what one types for them; those that it has are left out.

    Example:
      >>> lora = Sections(hub.Config(), tuning.Config(), optim.Config(), train.Config(), sharding.Config(2, 1, 1), 512)
      >>> for words in changes(lora):
      ...     print(words)
      --model.dtype bfloat16
      --model.remat block
      --train.microbatches 2
      --mesh.data 1 --mesh.fsdp 2
      --model.quantise nf4
    """
    s, found = sections, {}
    model = lambda **new: s._replace(model=dataclasses.replace(s.model, **new))
    if s.model.dtype == "float32":
        found["--model.dtype bfloat16"] = model(dtype="bfloat16")
    if s.model.remat != "block":
        found["--model.remat block"] = model(remat="block")
    pieces, shards = 2 * s.train.microbatches, s.mesh.data * s.mesh.fsdp
    if shards > 0 and s.mesh.expert > 0 and s.train.batch_size % (shards * s.mesh.expert * pieces) == 0:
        new = dataclasses.replace(s.train, microbatches=pieces)
        found[f"--train.microbatches {pieces}"] = s._replace(train=new)
    if s.mesh.data > 1 and s.mesh.fsdp > 0:
        new = dataclasses.replace(s.mesh, data=1, fsdp=shards)
        found[f"--mesh.data 1 --mesh.fsdp {shards}"] = s._replace(mesh=new)
    if s.tuning.method == "lora" and s.model.quantise == "none":
        found["--model.quantise nf4"] = model(quantise="nf4")
    return found


def show(work: Work, sections: Sections, device_gb: float | None) -> None:
    """Prints what a run needs, whether that fits, and if not what would help, each compiled like the run itself.

    Args:
      work, sections: as for `measure`.
      device_gb: memory of a device in 10^9 bytes; by default what the device says of itself.
    """
    pretend(sections.mesh)
    need, (mesh, stands_in) = measure(work, sections), _mesh(sections.mesh)
    room = int(device_gb * 1e9) if device_gb else None if stands_in else memory(mesh)
    size = lambda n: f"{n / 1e9:,.3f} GB"
    kind = f"{mesh.size} CPU devices that stand for the run's own" if stands_in else str(mesh.devices.flat[0])
    unknown = "unknown; say a device's memory with --run.device_gb"
    fits = unknown if room is None else f"{'yes' if need.total <= room else 'NO'}, a device has {size(room)}"
    report.summary(
        "what one device needs",
        {
            "compiled for": f"{kind}, mesh {sharding.describe(mesh)}",
            "parameters": f"{need.parameters:,}, of which {need.trained:,} train",
            "weights": size(need.weights),
            "optimizer": size(need.optimizer),
            "batch": size(need.batch),
            "activations, gradients, logits": f"{size(need.working)}; logits of one chunk are {size(need.logits)}",
            **({"cache of answers, while they are drawn": size(need.cache)} if need.cache else {}),
            "in all": size(need.total),
            "fits": fits,
        },
    )
    if room is None or need.total <= room:
        return
    rows = []
    for words, changed in changes(sections).items():
        less = measure(work, changed)
        rows.append((words, size(less.total), "yes" if less.total <= room else "no"))
    report.table("what would change that", ("change", "in all", "fits"), rows)


def memory(mesh: Mesh) -> int | None:
    """Bytes of one device; on a CPU its share of the machine's. None where nobody says."""
    device = mesh.devices.flat[0]
    if device.platform == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // mesh.size
    return (device.memory_stats() or {}).get("bytes_limit")
