"""Answers to many prompts at once, as arrays that a loss can learn from."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int

from jaxsft import axes, sharding
from jaxsft.models import Model
from jaxsft.sample import loop
from jaxsft.sample.draw import GREEDY, Draw
from jaxsft.sample.loop import STOP_TOKEN, Job, Shape
from jaxsft.sample.queue import pack
from jaxsft.sample.stops import Strings, until
from jaxsft.types import Key

SLOTS = 64  # answers in progress at one time, unless it is said


class Samples(NamedTuple):
    """Answers; those to one prompt stand together, in the order of the prompts."""

    tokens: Int[np.ndarray, "A T"]
    """new tokens, with the one that ended the answer; 0 behind it"""
    logprobs: Float[np.ndarray, "A T"]
    """of each token, under softmax(logits / temperature), see `pick`; 0 behind the last"""
    lengths: Int[np.ndarray, "A"]
    """new tokens, with the one that ended the answer"""
    finish: Int[np.ndarray, "A"]
    """why it ended: LENGTH, STOP_TOKEN or STOP_STRING"""


def generate(
    model: Model,
    variables: Mapping,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 128,
    draw: Draw = GREEDY,
    stop: Sequence[int] = (),
    strings: Strings | None = None,
    samples: int = 1,
    slots: int | None = None,
    key: Key | None = None,
    seeds: Sequence[int] | None = None,
) -> Samples:
    """Answers several prompts at once.

    An answer depends on its prompt, the key and its number alone: not on the other prompts, nor on `slots`.

    Args:
      model: from `hub.load` or `models.build`.
      variables: {"params": ..., "lora": ..., "packed": ...}.
      prompts: token ids, of any lengths above 0.
      max_new_tokens: the most tokens of an answer.
      draw: how tokens are drawn.
      stop: tokens that end an answer.
      strings: texts that end an answer, from `stops.compile`.
      samples: answers to each prompt.
      slots: answers in progress at one time, whose cache is in memory; by default all, but at most 64.
      key: of the draws; needed above temperature 0.
      seeds: a number for each answer, to be drawn by; by default its place, 0, 1, 2, ...

    Returns:
      len(prompts) x samples answers.

    Raises:
      ValueError: no prompt, an empty one, more tokens than the model has positions, a token that it does not have, no
        key where one is needed, seeds of another number than answers.

    Example:
      >>> import jaxsft
      >>> model, params = jaxsft.load(jaxsft.BASE)
      >>> found = generate(model, {"params": params}, [[5, 6], [7]], max_new_tokens=4)
      >>> found.tokens.shape, found.lengths.tolist()
      ((2, 4), [4, 4])
    """
    count, mesh = len(prompts) * samples, sharding.mesh_of(variables)
    apart = axes.rows(mesh)
    width = check(model, variables, prompts, max_new_tokens)
    numbers = np.arange(count) if seeds is None else np.asarray(seeds)
    if numbers.shape != (count,):
        raise ValueError(f"there are {count} answers and seeds of shape {numbers.shape}; give one for each answer")
    held = min(count, slots or SLOTS)
    pool = -(-held // samples)
    queue = pack(prompts, width=width, most=pool, apart=apart)
    numbers = np.pad(numbers, (0, len(queue.rows) * samples - count)).astype(np.uint32)
    table = None if strings is None else strings.table
    job = Job(queue, np.array(len(prompts), np.int32), needed(key, draw), numbers, table)
    held = -(-held // apart) * apart
    shape = Shape(width, max_new_tokens, samples, held, pool, draw, tuple(sorted(set(stop))), mesh)
    out = loop.run(model, variables, job, shape)
    return Samples(*(sharding.to_host(x)[:count] for x in out))


def answers(found: Samples) -> list[list[int]]:
    """The tokens of each answer, without the stop token that ended it.

    Example:
      >>> one = Samples(np.array([[5, 6, 2, 0]]), np.zeros((1, 4)), np.array([3]), np.array([STOP_TOKEN]))
      >>> answers(one)
      [[5, 6]]
    """
    ends = found.lengths - (found.finish == STOP_TOKEN)
    return [row[:end].tolist() for row, end in zip(found.tokens, ends, strict=True)]


def texts(found: Samples, tokenizer: Any, strings: Sequence[str] = ()) -> list[str]:
    """The answers in words, without the strings that ended them.

    Example:
      >>> class Letters:
      ...     def decode(self, ids, skip_special_tokens):
      ...         return "".join(map(chr, ids))
      >>> one = Samples(np.array([list(b"go END")]), np.zeros((1, 6)), np.array([6]), np.array([loop.STOP_STRING]))
      >>> texts(one, Letters(), ["END"])
      ['go ']
    """
    return [until(tokenizer.decode(answer, skip_special_tokens=True), strings) for answer in answers(found)]


def needed(key: Key | None, draw: Draw) -> Key:
    """The key, or any where nothing is drawn."""
    if draw.temperature and key is None:
        raise ValueError("temperature above 0 draws at random; give a key, such as jax.random.key(0)")
    return jax.random.key(0) if key is None else key


def check(model: Model, variables: Mapping, prompts: Sequence[Sequence[int]], new: int) -> int:
    """The width of the longest prompt, rounded up; refuses what cannot be answered."""
    if not len(prompts) or not all(len(p) for p in prompts):
        raise ValueError(
            "every prompt needs at least one token; an empty one can start with the model's bos or eos token"
        )
    longest = max(len(p) for p in prompts)
    if longest + new > model.config.max_position:
        raise ValueError(
            f"a prompt of {longest} tokens and {new} new ones exceed the model's {model.config.max_position} positions;"
            " shorten the prompt or lower max_new_tokens"
        )
    largest, rows = max(map(max, prompts)), len(variables["params"]["embed"]["table"])
    if largest >= rows:
        raise ValueError(
            f"a prompt has the token {largest}, and the model {rows} tokens; give it the tokenizer it was made with"
        )
    return bucket(longest)


def bucket(n: int) -> int:
    """The next number of 16, 24, 32, 48, 64, 96, ...: few, so that few programs are compiled.

    Example:
      >>> [bucket(n) for n in (1, 17, 25, 48, 49)]
      [16, 24, 32, 48, 64]
    """
    power = max(16, 1 << (n - 1).bit_length())
    return power * 3 // 4 if power > 16 and n <= power * 3 // 4 else power
