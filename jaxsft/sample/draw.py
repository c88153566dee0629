"""How the next token is chosen: what the model's distribution is sharpened and cut to, and a draw from what is left.

No step sorts the vocabulary: a threshold is found bit by bit (`threshold`), and a token by its place in the running sum
of the shares, first of pieces of the vocabulary, then within one. On a CPU, for 64 rows of 32,000 tokens, a sort
takes 420 ms and a Gumbel draw 34 ms; the threshold takes 15 ms and the draw 1 ms.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxsft.types import Key


class Draw(NamedTuple):
    """How a token is drawn; in this order, as transformers applies them, and what is off costs nothing."""

    temperature: float = 0.0
    """divides the logits; 0 takes the likeliest token"""
    top_k: int = 0
    """keeps the k likeliest, and ties with the last of them; 0 keeps all"""
    top_p: float = 1.0
    """then the smallest set of the likeliest whose probability reaches this (Holtzman et al. 2019, arXiv:1904.09751,
    eq. 2), and ties with the last of them; the likeliest always stays"""
    min_p: float = 0.0
    """then those at least this likely relative to the likeliest (Nguyen et al. 2024, arXiv:2407.01082, section 3)"""
    repetition_penalty: float = 1.0
    """before all of these, divides the logits above 0 of tokens that occurred before, and multiplies those below
    (Keskar et al. 2019, arXiv:1909.05858, section 4.1)"""


GREEDY = Draw()


@dataclass(frozen=True)
class Config:
    """How answers are drawn."""

    max_new_tokens: int = 128
    """the most tokens of an answer"""
    temperature: float = 0.0
    """0 takes the likeliest token; 1 draws from the model's own distribution"""
    top_k: int = 0
    """draw among the k likeliest tokens; 0: among all"""
    top_p: float = 1.0
    """draw among the likeliest tokens that together have this probability"""
    min_p: float = 0.0
    """draw among the tokens at least this likely, relative to the likeliest"""
    repetition_penalty: float = 1.0
    """above 1 makes tokens less likely that the prompt or the answer has already"""
    stop: list[str] = field(default_factory=list)
    """strings that end an answer, beside the model's own end, and are left out of it"""
    seed: int = 0
    """of the draws"""

    @property
    def draw(self) -> Draw:
        return Draw(self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty)


def pick(
    logits: Float[Array, "B V"], keys: Key, draw: Draw = GREEDY, seen: Bool[Array, "B V"] | None = None
) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
    """Chooses a token for each row.

    Args:
      logits: scores of the next token.
      keys: one a row; unused at temperature 0.
      draw: how.
      seen: tokens that occurred before; needed for a repetition penalty.

    Returns:
      the tokens, and the log-probability of each under softmax(logits / temperature) of the whole vocabulary, before
      anything is cut off or penalised; at temperature 0 under softmax(logits).

    Example:
      >>> tokens, logprobs = pick(jnp.log(jnp.array([[0.1, 0.6, 0.3]])), jax.random.split(jax.random.key(0), 1))
      >>> int(tokens[0]), round(float(jnp.exp(logprobs[0])), 3)
      (1, 0.6)
    """
    logits = logits.astype(jnp.float32)
    chosen = logits if draw.repetition_penalty == 1 else penalise(logits, seen, draw.repetition_penalty)
    scaled = logits / (draw.temperature or 1)
    if draw.temperature == 0:
        token = first(chosen == chosen.max(axis=-1, keepdims=True))
    else:
        token = inverse(cut(chosen / draw.temperature, draw), jax.vmap(jax.random.uniform)(keys))
    score = jnp.take_along_axis(scaled, token[:, None], axis=-1)[:, 0]
    return token, score - jax.nn.logsumexp(scaled, axis=-1)


def penalise(logits: Float[Array, "B V"], seen: Bool[Array, "B V"] | None, penalty: float) -> Float[Array, "B V"]:
    """Makes tokens less likely that occurred before.

    Example:
      >>> penalise(jnp.array([[1.0, -1.0, 3.0]]), jnp.array([[True, True, False]]), 2.0).tolist()
      [[0.5, -2.0, 3.0]]
    """
    if seen is None:
        raise ValueError(f"repetition_penalty is {penalty}; pick needs the tokens that were seen")
    return jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)


def cut(logits: Float[Array, "B V"], draw: Draw) -> Float[Array, "B V"]:
    """The shares of each row's tokens, relative to the likeliest's, which is 1; 0 for those that are cut off.

    Args:
      logits: divided by the temperature.
      draw: of which top_k, top_p and min_p count.

    Example:
      >>> shares = jnp.array([[0.1, 0.5, 0.4]])
      >>> [round(float(x), 2) for x in cut(jnp.log(shares), Draw(1.0, top_p=0.8))[0]]
      [0.0, 1.0, 0.8]
    """
    shares = jnp.exp(logits - logits.max(axis=-1, keepdims=True))
    if 0 < draw.top_k < shares.shape[-1]:
        least = threshold(shares, lambda kept: kept.sum(axis=-1) >= draw.top_k)
        shares = jnp.where(shares >= least, shares, 0)
    if draw.top_p < 1:
        enough = draw.top_p * shares.sum(axis=-1)
        least = threshold(shares, lambda kept: jnp.where(kept, shares, 0).sum(axis=-1) >= enough)
        shares = jnp.where(shares >= least, shares, 0)
    return jnp.where(shares >= draw.min_p, shares, 0) if draw.min_p else shares


def threshold(
    shares: Float[Array, "B V"], enough: Callable[[Bool[Array, "B V"]], Bool[Array, "B"]]
) -> Float[Array, "B 1"]:
    """The largest value such that what is not below it is enough, and at most the largest share.

    Bits of floats from 0 to 1 are in the order of the floats, so the value is found bit by bit, from the highest.

    Args:
      shares: from 0 to 1.
      enough: tells of the tokens that would be kept whether they are enough; of all of them it must be so.

    Example:
      >>> threshold(jnp.array([[0.2, 1.0, 0.5]]), lambda kept: kept.sum(axis=-1) >= 2).tolist()
      [[0.5]]
    """
    bits = jax.lax.bitcast_convert_type(shares, jnp.int32)

    def narrow(i, least):
        tried = least | (1 << (29 - i))  # 1.0 has no bit above the 29th
        return jnp.where(enough(bits >= tried[:, None]), tried, least)

    least = jax.lax.fori_loop(0, 30, narrow, jnp.zeros(len(shares), jnp.int32))
    return jax.lax.bitcast_convert_type(jnp.minimum(least, bits.max(axis=-1)), jnp.float32)[:, None]


def inverse(shares: Float[Array, "B V"], uniform: Float[Array, "B"]) -> Int[Array, "B"]:
    """The token in whose part of the row's sum the number falls: inverse transform sampling (Devroye 1986, II.2).

    Args:
      shares: of the tokens, not all 0; they need not sum to 1.
      uniform: from 0 to 1, without 1.

    Example:
      >>> inverse(jnp.array([[1.0, 0.0, 3.0]]), jnp.array([0.3])).tolist()
      [2]
    """
    B, V = shares.shape
    width = max(1, int(V**0.5))
    pieces = jnp.pad(shares, ((0, 0), (0, -V % width))).reshape(B, -1, width)
    piece, rest = _place(pieces.sum(axis=-1), uniform)
    inside, _ = _place(pieces[jnp.arange(B), piece], rest)
    return piece * width + inside


def _place(shares: Float[Array, "B N"], uniform: Float[Array, "B"]) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
    """Where the number falls, and how far it is through the part it falls in, from 0 to 1."""
    ends = jnp.cumsum(shares, axis=-1)
    target = uniform * ends[:, -1]
    found = (ends > target[:, None]) & (shares > 0)
    # Rounded sums need not grow with the shares: the last one that is not 0 stands for what lies beyond them.
    last = shares.shape[-1] - 1 - first((shares > 0)[:, ::-1])
    place = jnp.where(found.any(axis=-1), first(found), last)
    rows = jnp.arange(len(shares))
    own = shares[rows, place]
    return place, jnp.clip((target - (ends[rows, place] - own)) / own, 0, 1 - 2**-24)


def first(mask: Bool[Array, "B N"]) -> Int[Array, "B"]:
    """The first True of each row, the last place where there is none; on a CPU, a quarter of argmax's time."""
    N = mask.shape[-1]
    return jnp.where(mask, jnp.arange(N, dtype=jnp.int32), N - 1).min(axis=-1)
