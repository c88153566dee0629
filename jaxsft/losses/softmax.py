"""The softmax of scores that are seen a block of the vocabulary at a time, and what it makes of cotangents.

A block leaves a running maximum and sums below it (Milakov and Gimelshein 2018, arXiv:1805.02867, algorithm 3); sums
that several devices have add up in the same way.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxsft.losses.chunks import LOWEST, Block, Head, Table, over_vocabulary, rows_of, vocabulary

Want = frozenset[str]  # of "entropy", "collision", "top1"


class Found(NamedTuple):
    """What was found of each token; None where it was not asked for."""

    logprobs: Float[Array, "*N"]
    entropy: Any = None  # Float[Array, "*N"]
    collision: Any = None  # Float[Array, "*N"]: log sum_v p_v^2
    top1: Any = None  # Int[Array, "*N"]


class Seen(NamedTuple):
    """What N tokens saw of a part of the vocabulary. With l_v their scores and w_v = exp(l_v - highest):"""

    highest: Float[Array, "N"]
    total: Float[Array, "N"]  # sum_v w_v
    target: Float[Array, "N"]  # l of the target; 0 where it was not in the part
    spread: Any = None  # sum_v w_v (l_v - highest)
    squares: Any = None  # sum_v w_v^2
    best: Any = None  # the first v of the highest score
    mixed: Any = None  # sum_v w_v slope_v W_v, float32 [N, D]

    @property
    def logsumexp(self) -> Float[Array, "N"]:
        return self.highest + jnp.log(self.total)

    def found(self) -> Found:
        some = lambda x, f: None if x is None else f(x)
        return Found(
            self.target - self.logsumexp,
            # Two terms of which neither is below 0.
            some(self.spread, lambda x: jnp.log(self.total) - x / self.total),
            some(self.squares, lambda x: jnp.log(x) - 2 * jnp.log(self.total)),
            self.best,
        )


def below(seen: Seen, highest: Float[Array, "N"]) -> Seen:
    """The same sums, of weights below another highest score, which is not lower."""
    drop = seen.highest - highest
    fade = jnp.exp(drop)
    some = lambda x, f: None if x is None else f(x)
    return seen._replace(
        highest=highest,
        total=fade * seen.total,
        spread=some(seen.spread, lambda x: fade * (x + drop * seen.total)),
        squares=some(seen.squares, lambda x: fade * fade * x),
        mixed=some(seen.mixed, lambda x: fade[:, None] * x),
    )


def look(f, targets, table, head: Head, want: Want, mix: bool) -> Seen:
    """Shows all rows of `table` to the features f [t, D]; a target that is no row of it is another device's."""

    def step(seen: Seen, block: Block) -> Seen:
        scores, slope = _scores(f, block, head)
        own = scores.max(axis=-1)
        highest = jnp.maximum(seen.highest, own)
        faded = below(seen, highest)
        shifted = scores - highest[:, None]
        weights = jnp.exp(shifted)
        at, there = _within(targets, block)
        hit = jnp.take_along_axis(scores, at[:, None], axis=-1)[:, 0]
        more: dict[str, Any] = {}
        if "entropy" in want:
            more["spread"] = faded.spread + (weights * shifted).sum(axis=-1)
        if "collision" in want:
            more["squares"] = faded.squares + (weights * weights).sum(axis=-1)
        if "top1" in want:
            number = jnp.where(scores == own[:, None], block.start + jnp.arange(len(block.rows)), vocabulary(table))
            more["best"] = jnp.where(own > seen.highest, number.min(axis=-1), seen.best)
        if mix:
            more["mixed"] = faded.mixed + _back(weights * slope, block, f.dtype)
        target = jnp.where(there, hit, seen.target)
        # As a product, which is computed by itself: a sum is fused with what else is asked for, and then rounded in
        # another way, and a policy that is its reference has to be it to the last bit.
        total = jnp.matmul(weights, jnp.ones(len(block.rows)), precision="highest")
        return faded._replace(total=faded.total + total, target=target, **more)

    zeros = jnp.zeros(len(f), jnp.float32)
    start = Seen(
        jnp.full(len(f), LOWEST),
        zeros,
        zeros,
        zeros if "entropy" in want else None,
        zeros if "collision" in want else None,
        zeros.astype(jnp.int32) if "top1" in want else None,
        jnp.zeros(f.shape, jnp.float32) if mix else None,
    )
    return over_vocabulary(step, start, table, head.block.vocabulary, f.dtype)


def _scores(f: Float[Array, "t D"], block: Block, head: Head) -> tuple[Float[Array, "t v"], Array | float]:
    """Scores, with LOWEST for rows that another block had, and d scores / d products."""
    scores = head.scores(jnp.einsum("td,vd->tv", f, block.rows, preferred_element_type=jnp.float32))
    return scores if block.new is None else jnp.where(block.new, scores, LOWEST), head.slope(scores)


def _back(x: Float[Array, "t v"], block: Block, dtype: jax.typing.DTypeLike) -> Float[Array, "t D"]:
    return jnp.einsum("tv,vd->td", x.astype(dtype), block.rows, preferred_element_type=jnp.float32)


def _within(targets: Int[Array, "t"], block: Block) -> tuple[Int[Array, "t"], Bool[Array, "t"]]:
    """Where in the block a target is, and whether it is, for the first time."""
    at = targets - block.start
    there = (at >= 0) & (at < len(block.rows))
    at = jnp.clip(at, 0, len(block.rows) - 1)
    return at, there if block.new is None else there & block.new[at]


def together(seen: Seen, axis: str, offset: Int[Array, ""]) -> Seen:
    """What the devices of an axis saw, each a part of the vocabulary that begins at `offset`; but not `mixed`."""
    highest = jax.lax.pmax(seen.highest, axis)
    faded = below(seen, highest)
    add = lambda x: None if x is None else jax.lax.psum(x, axis)
    best = None
    if seen.best is not None:
        behind = jnp.iinfo(jnp.int32).max
        best = jax.lax.pmin(jnp.where(seen.highest == highest, seen.best + offset, behind), axis)
    sums = {name: add(getattr(faded, name)) for name in ("total", "target", "spread", "squares")}
    return faded._replace(**sums, best=best)


def pull(
    seen: Seen, targets: Int[Array, "t"], table: Table, head: Head, dtype: jax.typing.DTypeLike
) -> Float[Array, "t D"]:
    """d lp / d f, as far as the rows of `table` have a part in it: slope_y W_y - sum_v p_v slope_v W_v.

    The difference is float32: where the target is nearly certain, the two are nearly the same.
    """
    there = (targets >= 0) & (targets < vocabulary(table))
    rows = rows_of(table, jnp.clip(targets, 0, vocabulary(table) - 1), dtype)
    own = jnp.where(there, head.slope(seen.target), 0.0)[:, None] * rows
    return own - seen.mixed / seen.total[:, None]


class Token(NamedTuple):
    """What is known of t tokens when their softmax is made again."""

    features: Float[Array, "t D"]
    target: Int[Array, "t"]
    logsumexp: Float[Array, "t"]
    of_lp: Float[Array, "t"]  # cotangents
    entropy: Any = None  # Float[Array, "t"]
    of_entropy: Any = None


def pull_again(
    grad_table: Float[Array, "V D"] | None, token: Token, table: Table, head: Head
) -> tuple[Float[Array, "V D"] | None, Float[Array, "t D"]]:
    """What the cotangents make of the table, added to `grad_table` where it trains, and of the features.

    d lp / d scores = one-hot(target) - p;  d entropy / d scores = -p (log p + entropy)
    """
    f = token.features
    column = lambda x: x[:, None]

    def step(carry: tuple, block: Block) -> tuple:
        grad_table, grad_features = carry
        scores, slope = _scores(f, block, head)
        logp = scores - column(token.logsumexp)
        p = jnp.exp(logp)
        at, there = _within(token.target, block)
        hit = column(there) & (jnp.arange(len(block.rows)) == column(at))
        moved = column(token.of_lp) * (hit - p)
        if token.of_entropy is not None:
            moved -= column(token.of_entropy) * p * (logp + column(token.entropy))
        moved = (moved * slope).astype(f.dtype)
        if grad_table is not None:
            old = jax.lax.dynamic_slice_in_dim(grad_table, block.start, len(block.rows))
            new = old + jnp.einsum("tv,td->vd", moved, f, preferred_element_type=jnp.float32)
            grad_table = jax.lax.dynamic_update_slice_in_dim(grad_table, new, block.start, axis=0)
        return grad_table, grad_features + _back(moved, block, f.dtype)

    start = grad_table, jnp.zeros(f.shape, jnp.float32)
    return over_vocabulary(step, start, table, head.block.vocabulary, f.dtype)
