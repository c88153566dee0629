"""Where tokens stand, and the one rule of who sees whom: for training, prefill and decoding, by every kernel."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

NO_WINDOW = 1 << 30  # positions a token looks back where there is no sliding window


class Where(NamedTuple):
    """Where tokens stand: position inside the document, and which document of the row (0: none, padding)."""

    positions: Int[Array, "B T"]
    segments: Int[Array, "B T"]
    reads: Int[Array, "B T"] | None = None  # a segment that queries see beside their own, see `types.Pairs`


def visible(
    query: Where, key: Where, window: Int[Array, ""] | int = NO_WINDOW, *, causal: bool = True
) -> Bool[Array, "B T S"]:
    """Which keys each query attends to: its own document's, up to itself, at most `window` positions back.

    Where it is not causal: all of its own document's, before and behind it, whatever the window. A query that `reads`
    another segment sees its keys by the same rule, so that a prompt may go on in two ways.

    Two documents and one padding token in a row, `x` for visible:

        segments   1 1 2 2 0
        token 0    x . . . .
        token 1    x x . . .
        token 2    . . x . .
        token 3    . . x x .
        token 4    . . . . x     padding sees padding, so that no softmax is empty

    A prompt of two tokens, and two answers that both read it:

        positions  0 1 2 3 2
        segments   1 1 2 2 3
        reads      1 1 1 1 1
        token 0    x . . . .
        token 1    x x . . .
        token 2    x x x . .
        token 3    x x x x .
        token 4    x x . . x

    Example:
      >>> where = Where(jnp.array([[0, 1, 0, 1, 0]]), jnp.array([[1, 1, 2, 2, 0]]))
      >>> visible(where, where)[0].astype(int).tolist()
      [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 1]]
    """
    same = query.segments[:, :, None] == key.segments[:, None, :]
    if query.reads is not None:
        same |= query.reads[:, :, None] == key.segments[:, None, :]
    if not causal:
        return same
    distance = query.positions[:, :, None] - key.positions[:, None, :]
    return same & (distance >= 0) & (distance < window)


def pad(
    multiple: int, q: Float[Array, "B T N H"], k: Float[Array, "B T K H"], v: Float[Array, "B T K H"], where: Where
) -> tuple[Float[Array, "B U N H"], Float[Array, "B U K H"], Float[Array, "B U K H"], Where]:
    """Makes rows longer, up to the next multiple, by tokens that see and are seen by each other alone.

    Example:
      >>> x, where = jnp.ones((1, 3, 1, 1)), Where(jnp.array([[0, 1, 0]]), jnp.array([[1, 1, 0]]))
      >>> pad(2, x, x, x, where)[-1].segments
      Array([[ 1,  1,  0, -1]], dtype=int32)
    """
    more = -q.shape[1] % multiple
    longer = lambda x, fill=0: jnp.pad(x, [(0, 0), (0, more), *[(0, 0)] * (x.ndim - 2)], constant_values=fill)
    reads = None if where.reads is None else longer(where.reads, -1)
    return longer(q), longer(k), longer(v), Where(longer(where.positions), longer(where.segments, -1), reads)
