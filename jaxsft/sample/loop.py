"""The compiled loop: prompts are read into a pool, slots take them from there, and all slots draw a token at a time.

A slot that has finished its answer takes the next one at once (continuous batching: Yu et al. 2022, Orca), so a long
answer holds one slot and not the batch. Several answers to a prompt share what was computed of it.

    pool    a piece of the queue, read at one time; a slot that takes a prompt copies it, `samples` slots in turn
    slots   B answers in progress; slot s of a row's cache holds its token at position s, so each row has its own cursor
            and whatever lies ahead of it, where nothing looks, is written over

Draws depend on the key, an answer's number and a token's, never on slots or on what else is in the batch.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from jaxsft import axes
from jaxsft.models import Cache, Model, logits
from jaxsft.sample.draw import Draw, first, pick
from jaxsft.sample.queue import Queue
from jaxsft.types import Key

LENGTH, STOP_TOKEN, STOP_STRING = 0, 1, 2  # why an answer ended


class Job(NamedTuple):
    """What is asked: prompts, how many of them are real, and how answers are drawn and end."""

    queue: Queue
    count: Int[Array | np.ndarray, ""]
    key: Key
    seeds: Int[Array | np.ndarray, "A"]  # of each answer
    strings: Int[Array | np.ndarray, "S V"] | None  # see `stops`


class Shape(NamedTuple):
    """The numbers that decide what is compiled."""

    width: int  # that no prompt exceeds
    new: int  # the most tokens of an answer
    samples: int  # answers to a prompt
    slots: int  # answers in progress at one time
    pool: int  # the most prompts of a piece of the queue
    draw: Draw
    stop: tuple[int, ...]
    mesh: Mesh | None


class Out(NamedTuple):
    """Answers, those to one prompt together; see `Samples`."""

    tokens: Int[Array, "A T"]
    logprobs: Float[Array, "A T"]
    lengths: Int[Array, "A"]
    finish: Int[Array, "A"]


class _Pool(NamedTuple):
    """A piece of the queue that was read."""

    cache: Cache  # of its rows
    scores: Float[Array, "M V"]  # of the first new token of each of its prompts
    first: Int[Array, ""]  # of its prompts
    until: Int[Array, ""]  # the first prompt behind it
    pieces: Int[Array, ""]  # that were read so far


class _Slots(NamedTuple):
    answer: Int[Array, "B"]  # its number; A where the slot is free
    drawn: Int[Array, "B"]  # tokens of it so far
    scores: Float[Array, "B V"]  # of its next token
    cache: Cache
    seen: Bool[Array, "B V"] | None  # tokens of prompt and answer, where repetition is penalised
    state: Int[Array, "B"]  # how much of a stop string the text ends with


@functools.partial(jax.jit, static_argnums=(0, 3))
def run(model: Model, variables: Mapping, job: Job, shape: Shape) -> Out:
    """Answers all prompts; one program for all jobs of the same shape."""
    A = len(job.seeds)
    read, take = _reader(model, variables, job, shape), _taker(job, shape)
    advance = _advancer(model, variables, job, shape)

    def fill(carry):
        def wanted(carry):
            following, _, slots = carry
            return (following < job.count * shape.samples) & (slots.answer >= A).any()

        def one(carry):
            following, pool, slots = carry
            pool = jax.lax.while_loop(lambda pool: following // shape.samples >= pool.until, read, pool)
            return following + 1, pool, take(following, pool, slots)

        return jax.lax.while_loop(wanted, one, carry)

    def go_on(carry):
        following, _, slots, _ = carry
        return (following < job.count * shape.samples) | (slots.answer < A).any()

    def step(carry):
        *before, out = carry
        following, pool, slots = fill(tuple(before))
        slots, out = advance(slots, out)
        return following, pool, slots, out

    scores = lambda rows: jnp.zeros((rows, _vocabulary(model, variables)), jnp.float32)
    B, zeros = shape.slots, jnp.zeros(shape.slots, jnp.int32)
    _, R, W = job.queue.tokens.shape
    zero = jnp.int32(0)
    pool = _Pool(_lay(model.cache(R, W + shape.width), shape.mesh), scores(shape.pool), zero, zero, zero)
    first, cache = _lay((scores(B), model.cache(B, shape.width + shape.new)), shape.mesh)
    seen = None if shape.draw.repetition_penalty == 1 else first > 0
    slots = _Slots(zeros + A, zeros, first, cache, seen, zeros)
    table = lambda dtype: jnp.zeros((A, shape.new), dtype)
    out = Out(table(jnp.int32), table(jnp.float32), jnp.zeros(A, jnp.int32), jnp.zeros(A, jnp.int32))
    *_, out = jax.lax.while_loop(go_on, step, (zero, pool, slots, out))
    return out


def _vocabulary(model: Model, variables: Mapping) -> int:
    return jax.eval_shape(model.output, variables).shape[0]


def _lay(x: Any, mesh: Mesh | None) -> Any:
    """Says how scores [rows, V] and caches lie: rows over `axes.ROWS`, heads over `axes.TENSOR`."""

    def one(x: Array) -> Array:
        if mesh is None:
            return x
        heads = axes.TENSOR if x.ndim > 2 and x.shape[2] % mesh.shape[axes.TENSOR] == 0 else None
        spec = PartitionSpec(None, axes.ROWS, heads) if x.ndim > 2 else PartitionSpec(axes.ROWS)
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

    return jax.tree.map(one, x)


def _reader(model: Model, variables: Mapping, job: Job, shape: Shape) -> Callable[[_Pool], _Pool]:
    """Makes pool -> the next piece of the queue."""
    queue = job.queue

    def read(pool: _Pool) -> _Pool:
        tokens, positions, segments = (x[pool.pieces] for x in (queue.tokens, queue.positions, queue.segments))
        numbers = jnp.minimum(pool.until + jnp.arange(shape.pool), len(queue.rows) - 1)
        ends = queue.rows[numbers], queue.starts[numbers] + queue.lengths[numbers] - 1
        scores, cache = prefill(model, variables, tokens, positions, segments, ends, room=shape.width)
        return _Pool(_lay(cache, shape.mesh), scores, pool.until, queue.until[pool.pieces], pool.pieces + 1)

    return read


def prefill(
    model: Model,
    variables: Mapping,
    tokens: Int[Array, "R W"],
    positions: Int[Array, "R W"],
    segments: Int[Array, "R W"],
    ends: tuple[Int[Array, "M"], Int[Array, "M"]],
    *,
    room: int,
) -> tuple[Float[Array, "M V"], Cache]:
    """Reads prompts.

    Args:
      model, variables: see `generate`.
      tokens, positions, segments: packed rows.
      ends: row and place of the last token of each prompt.
      room: slots behind those of the rows.

    Returns:
      the scores of what follows each prompt, and what is remembered of the rows.
    """
    features, cache = model.read(variables, tokens, positions, segments)
    wider = lambda x, axis: jnp.pad(x, [(0, room * (i == axis)) for i in range(x.ndim)])
    return logits(model, variables, features[ends][:, None])[:, 0], Cache(wider(cache.k, 4), wider(cache.v, 3))


def extend(
    model: Model, variables: Mapping, token: Int[Array, "B"], positions: Int[Array, "B"], cache: Cache
) -> tuple[Float[Array, "B V"], Cache]:
    """Reads one more token of each row; gives the scores of what follows it."""
    features, cache = model.extend(variables, token[:, None], positions[:, None], cache)
    return logits(model, variables, features)[:, 0], cache


def _taker(job: Job, shape: Shape) -> Callable[[Int[Array, ""], _Pool, _Slots], _Slots]:
    """Makes (answer, pool, slots) -> the slots, of which a free one has begun that answer."""
    queue, P = job.queue, shape.width

    def take(answer: Int[Array, ""], pool: _Pool, slots: _Slots) -> _Slots:
        slot = first((slots.answer >= len(job.seeds))[None])[0]
        prompt = answer // shape.samples
        put = lambda whole, part, axis: jax.lax.dynamic_update_slice_in_dim(whole, part, slot, axis)

        def cut(whole: Array, axis: int) -> Array:
            row = jnp.take(whole, queue.rows[prompt][None], axis=1)
            return jax.lax.dynamic_slice_in_dim(row, queue.starts[prompt], P, axis)

        k, v = put(slots.cache.k, cut(pool.cache.k, 4), 1), put(slots.cache.v, cut(pool.cache.v, 3), 1)
        seen = slots.seen
        if seen is not None:
            piece = jax.lax.dynamic_index_in_dim(queue.tokens, pool.pieces - 1, keepdims=False)
            there = jnp.pad(piece[queue.rows[prompt]], (0, P))
            there = jax.lax.dynamic_slice_in_dim(there, queue.starts[prompt], P)
            there = jnp.where(jnp.arange(P) < queue.lengths[prompt], there, seen.shape[1])
            seen = put(seen, jnp.zeros((1, seen.shape[1]), bool).at[0, there].set(True, mode="drop"), 0)
        return _Slots(
            answer=slots.answer.at[slot].set(answer),
            drawn=slots.drawn.at[slot].set(0),
            scores=put(slots.scores, pool.scores[prompt - pool.first][None], 0),
            cache=Cache(k, v),
            seen=seen,
            state=slots.state.at[slot].set(0),
        )

    return take


def _advancer(model: Model, variables: Mapping, job: Job, shape: Shape) -> Callable[[_Slots, Out], tuple[_Slots, Out]]:
    """Makes (slots, out) -> both, one token later."""

    def advance(slots: _Slots, out: Out) -> tuple[_Slots, Out]:
        A = len(job.seeds)
        key = lambda seed, drawn: jax.random.fold_in(jax.random.fold_in(job.key, seed), drawn)
        keys = jax.vmap(key)(job.seeds[slots.answer], slots.drawn)
        token, logprob = pick(slots.scores, keys, shape.draw, slots.seen)
        state, finish, done = _ends(token, slots, job, shape)
        where = slots.answer, slots.drawn  # a free slot writes beside the table
        out = Out(
            out.tokens.at[where].set(token, mode="drop"),
            out.logprobs.at[where].set(logprob, mode="drop"),
            out.lengths.at[slots.answer].set(slots.drawn + 1, mode="drop"),
            out.finish.at[slots.answer].set(finish, mode="drop"),
        )
        positions = job.queue.lengths[slots.answer // shape.samples] + slots.drawn
        scores, cache = _lay(extend(model, variables, token, positions, slots.cache), shape.mesh)
        seen = slots.seen
        if seen is not None:
            seen = seen.at[jnp.arange(len(token)), token].set(True)
        return _Slots(jnp.where(done, A, slots.answer), slots.drawn + 1, scores, cache, seen, state), out

    return advance


def _ends(token: Int[Array, "B"], slots: _Slots, job: Job, shape: Shape) -> tuple[Array, Array, Array]:
    """The state of the text, why it would end here, and whether it does."""
    stops = jnp.isin(token, jnp.array(shape.stop, jnp.int32)) if shape.stop else jnp.zeros(token.shape, bool)
    state, strings = slots.state, jnp.zeros(token.shape, bool)
    if job.strings is not None:
        known = token < job.strings.shape[1]
        state = jnp.where(known, job.strings[state, token], state).astype(jnp.int32)
        strings = state < 0
    finish = jnp.where(stops, STOP_TOKEN, jnp.where(strings, STOP_STRING, LENGTH))
    return state, finish, stops | strings | (slots.drawn + 1 >= shape.new)
