"""Blocks of tokens times blocks of the vocabulary, one after the other, so that few scores exist at one time.

Tokens that count are counted off first, and only they are read: a loop over their chunks ends with the last of them.
Within a chunk of tokens the output table passes by in chunks of its rows. The table is [V, D], or such a one packed:
`quant.pack(table.T, "int8")`, of which a chunk at a time is dequantised.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from jaxsft import narrow, quant

Table = Float[Array, "V D"] | Mapping[str, Array]  # the output layer, a row a token, or what `quant.pack` made of it


class Chunk(NamedTuple):
    """How many scores exist at one time on a device: those of so many tokens for so many rows of the table."""

    tokens: int
    vocabulary: int


CHUNK_CPU = Chunk(512, 8192)  # as fast as any that was measured, and 17 MB
CHUNK = Chunk(4096, 16_384)  # large products, and few of them; 268 MB
LOWEST = float(jnp.finfo(jnp.float32).min) / 2  # below all scores, and finite: times 0 it is 0


class Head(NamedTuple):
    """What makes scores of the products of features and table, and where."""

    scale: float = 1.0
    soft_cap: float | None = None
    temperature: float = 1.0
    chunk: Chunk | None = None  # by default what suits the backend
    mesh: Mesh | None = None

    @property
    def block(self) -> Chunk:
        return self.chunk or (CHUNK_CPU if jax.default_backend() == "cpu" else CHUNK)

    def scores(self, products: Float[Array, "..."]) -> Float[Array, "..."]:
        scores = products if self.scale == 1 else products * self.scale
        scores = scores if self.soft_cap is None else self.soft_cap * jnp.tanh(scores / self.soft_cap)
        return scores if self.temperature == 1 else scores / self.temperature

    def slope(self, scores: Float[Array, "..."]) -> Float[Array, "..."] | float:
        """d scores / d products, from the scores."""
        slope = self.scale / self.temperature
        if self.soft_cap is None:
            return slope
        return slope * (1 - (scores * (self.temperature / self.soft_cap)) ** 2)


class Compact(NamedTuple):
    """How N tokens are reordered so that those that count come first, and filled up to whole chunks."""

    order: Int[Array, "Nc"]  # where each token stood
    place: Int[Array, "N"]  # where each token that counts went
    mask: Bool[Array, "N"]  # which count
    width: int  # tokens of a chunk

    @property
    def count(self) -> Int[Array, ""]:
        return self.mask.sum()

    def take(self, x: Array, start: Int[Array, ""]) -> Array:
        """The chunk that begins at `start`, of an array [N, ...]; zeros behind the last token that counts."""
        there = start + jnp.arange(self.width) < self.count
        found = x[jax.lax.dynamic_slice_in_dim(self.order, start, self.width)]
        return jnp.where(there.reshape(-1, *[1] * (x.ndim - 1)), found, 0)

    def back(self, x: Array) -> Array:
        """[Nc, ...] -> [N, ...], zeros for tokens that do not count."""
        return jnp.where(self.mask.reshape(-1, *[1] * (x.ndim - 1)), x[self.place], 0)


def compact(mask: Bool[Array, "N"], tokens: int) -> Compact:
    """The order for `mask`, in chunks of at most `tokens`.

    Example:
      >>> found = compact(jnp.array([False, True, False, True]), 2)
      >>> found.order.tolist(), found.back(jnp.array([5, 6, 7, 7])).tolist()
      ([1, 3, 0, 0], [0, 5, 0, 6])
    """
    size = len(mask)
    width = min(size, max(1, tokens))
    length = size + -size % width
    place = jnp.cumsum(mask) - 1
    order = jnp.zeros(length, jnp.int32).at[jnp.where(mask, place, length)].set(jnp.arange(size), mode="drop")
    return Compact(order, jnp.maximum(place, 0), mask, width)


def over_tokens(step: Callable[[Any, Array], tuple[Any, Any]], carry: Any, rows: Compact) -> tuple[Any, Any]:
    """Runs `step(carry, start) -> (carry, out)` over the chunks that hold tokens, as `jax.lax.scan` would.

    Returns:
      the carry, and the outputs [width, ...] joined to [Nc, ...], zeros where there was nothing to do.
    """
    shapes = jax.eval_shape(step, carry, jnp.int32(0))[1]
    out = jax.tree.map(lambda s: jnp.zeros((len(rows.order), *s.shape[1:]), s.dtype), shapes)

    def body(i: Array, state: tuple[Any, Any]) -> tuple[Any, Any]:
        carry, out = state
        start = i * rows.width
        carry, found = step(carry, start)
        write = lambda whole, part: jax.lax.dynamic_update_slice_in_dim(whole, part, start, axis=0)
        return carry, jax.tree.map(write, out, found)

    return jax.lax.fori_loop(0, (rows.count + rows.width - 1) // rows.width, body, (carry, out))


class Block(NamedTuple):
    """Some rows of the table, [v, D] in the dtype of the computation."""

    rows: Float[Array, "v D"]
    start: Int[Array, ""]  # the first one's number
    new: Bool[Array, "v"] | None  # which were in no block before; None where all are new


def over_vocabulary(
    step: Callable[[Any, Block], Any], carry: Any, table: Table, chunk: int, dtype: jax.typing.DTypeLike
) -> Any:
    """Runs `step(carry, block) -> carry` over blocks of at most `chunk` rows; the last may repeat rows."""
    size = vocabulary(table)
    count = -(-size // max(1, chunk))
    width = min(size, _rounded(-(-size // count)))
    count = -(-size // width)

    def body(carry: Any, i: Array) -> tuple[Any, None]:
        start = jnp.minimum(i * width, size - width)
        new = None if size % width == 0 else start + jnp.arange(width) >= i * width
        return step(carry, Block(_block(table, start, width, dtype), start, new)), None

    return jax.lax.scan(body, carry, jnp.arange(count))[0]


def _rounded(width: int) -> int:
    """Up to what is whole tiles of a product, where that is little more."""
    return width if width < 1024 else width + -width % 128


def vocabulary(table: Table) -> int:
    """V.

    Example:
      >>> table = jnp.ones((5, 64))
      >>> vocabulary(table), vocabulary(quant.pack(table.T, "int8"))
      (5, 5)
    """
    return table["codes"].shape[-1] if isinstance(table, Mapping) else table.shape[0]


def _block(table: Table, start: Array, width: int, dtype: jax.typing.DTypeLike) -> Float[Array, "v D"]:
    if isinstance(table, Mapping):
        part = {name: jax.lax.dynamic_slice_in_dim(x, start, width, axis=-1) for name, x in table.items()}
        return quant.unpack(part, dtype).T
    return narrow.moved(lambda x, at: jax.lax.dynamic_slice_in_dim(x, at, width), table, start).astype(dtype)


def rows_of(table: Table, tokens: Int[Array, "N"], dtype: jax.typing.DTypeLike) -> Float[Array, "N D"]:
    """The rows of some tokens, as `over_vocabulary` shows them."""
    if isinstance(table, Mapping):
        return quant.unpack({name: x[..., tokens] for name, x in table.items()}, dtype).T
    return narrow.moved(lambda table, tokens: table[tokens], table, tokens).astype(dtype)
