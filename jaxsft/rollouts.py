"""Episodes, prompts and the answers that were drawn to them, as packed rows to learn from.

    prompt a b c, answer d e     ->   tokens   a b c d e f g h .
    prompt f, answer g h              mask     0 0 0 1 1 0 1 1 0     what the policy chose
                                      episode  0 0 0 0 0 1 1 1 2     N = 2 where there is none

No padding is computed but what is left at the rows' ends, and the number of rows is rounded up to one of few, so that
a step is compiled for a few shapes only.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int

from jaxsft import sharding
from jaxsft.data import pack as packing
from jaxsft.data.render import Example
from jaxsft.types import Tokens


class Packed(NamedTuple):
    """Rows of episodes."""

    tokens: Tokens
    episode: Int[np.ndarray, "B T"]  # the number of the episode that a token belongs to


def pack(prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], *, length: int, unit: int = 1) -> Packed:
    """Places episodes side by side in rows.

    Args:
      prompts: token ids of each episode's prompt.
      answers: those that were drawn, the one that ended the answer included; an episode without any takes no room.
      length: tokens of a row.
      unit: the number of rows is a multiple of this, see `ladder`.

    Raises:
      ValueError: an episode is longer than a row.

    Example:
      >>> packed = pack([[5, 6, 7], [8]], [[9, 3], [4, 3]], length=9)
      >>> packed.tokens.tokens.tolist(), packed.episode.tolist()
      ([[5, 6, 7, 9, 3, 8, 4, 3, 0]], [[0, 0, 0, 0, 0, 1, 1, 1, 2]])
    """
    told = [i for i, answer in enumerate(answers) if len(answer)]
    episodes = [_episode(prompts[i], answers[i]) for i in told]
    order, ends = packing.plan(np.array([len(one.ids) for one in episodes], np.int32), length)
    rows, numbers = [], []
    for row in range(ladder(len(ends) - 1, unit)):
        here = order[ends[row] : ends[row + 1]] if row < len(ends) - 1 else ()
        rows.append(packing.fill([episodes[i] for i in here], length))
        names = np.array([*(told[i] for i in here), len(answers)], np.int32)
        numbers.append(names[rows[-1].segments - 1])  # padding has segment 0, and takes the last
    return Packed(jax.tree.map(lambda *x: np.stack(x), *rows), np.stack(numbers))


def _episode(prompt: Sequence[int], answer: Sequence[int]) -> Example:
    ids = np.array([*prompt, *answer], np.int32)
    return Example(ids, np.arange(len(ids)) >= len(prompt))


def ladder(rows: int, unit: int) -> int:
    """The number of rows to fill up to: `unit` times 1, 2, 3, 4, 6, 8, 12, 16, 24, ...

    Example:
      >>> [ladder(rows, 2) for rows in (1, 3, 9, 11)]
      [2, 4, 12, 12]
    """
    needed, steps = max(1, -(-rows // unit)), 1
    while steps < needed:
        power = steps & (steps - 1) == 0  # 4 -> 6 -> 8
        steps = steps + max(1, steps // 2) if power else steps // 3 * 4
    return unit * steps


def place(rows: Any, mesh: Mesh) -> Any:
    """Puts rows, which every process has whole, on the devices."""
    put = lambda x, where: jax.make_array_from_callback(x.shape, where, lambda index: x[index])
    return jax.tree.map(put, rows, sharding.batch(rows, mesh))


def minibatches(draw: np.random.Generator, packed: Packed, count: int) -> Int[np.ndarray, "count rows"]:
    """The rows of each minibatch of one epoch, in a new order; those without an episode are shared out evenly, so that
    no minibatch is empty if that can be.

    Example:
      >>> packed = pack([[5, 6], [7], [8]], [[1, 2], [3, 4], [3]], length=4, unit=2)  # three rows, and an empty one
      >>> (minibatches(np.random.default_rng(0), packed, 2) < 3).sum(axis=1).tolist()
      [2, 1]
    """
    used = int((packed.tokens.segments > 0).any(axis=1).sum())  # the empty ones come last
    order = np.concatenate([draw.permutation(used), np.arange(used, len(packed.episode))])
    return order.reshape(-1, count).T
