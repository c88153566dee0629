"""Log-probabilities of tokens from features, without the [B, T, V] array of logits.

Chunks of the tokens that count meet the output table one after the other, see chunks.py. Products run in the dtype of
the features with float32 accumulation, the softmax in float32. The gradient is written by hand:

    d lp / d f = W_y - sum_v p_v W_v    per token: formed in the forward pass, scaled in the backward pass
    d lp / d W needs the chunk's softmax again, and is only computed where the table trains

The entropy of the whole distribution comes of the same pass. Where it is to have a gradient, too, the chunk's softmax
is made again for both: two gradients of every token would be kept otherwise.
"""

import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxsft.losses.chunks import Head, chunks, compact, scores


def shift(
    tokens: Int[Array, "B T"], mask: Bool[Array, "B T"], segments: Int[Array, "B T"]
) -> tuple[Int[Array, "B T"], Bool[Array, "B T"]]:
    """Pairs each position with the token it predicts: the next one of the same document.

        tokens    a b c d e .        targets   b c d e . a
        segments  1 1 2 2 2 0        learned   1 0 1 1 0 0     b, d, e: those with mask 1 that have a predecessor
        mask      0 1 1 1 1 0

    Args:
      tokens: token ids.
      mask: is this token learned?
      segments: document numbers; 0 is padding.

    Returns:
      (targets, learned): the id to predict at each position and whether it counts. A document's first token never
      counts, so `learned.sum()` is the number of predicted tokens, the only right divisor of the loss.

    Example:
      >>> row = lambda *x: jnp.array([x])
      >>> targets, learned = shift(row(1, 2, 3, 4, 5, 0), row(0, 1, 1, 1, 1, 0) > 0, row(1, 1, 2, 2, 2, 0))
      >>> learned[0].astype(int).tolist()
      [1, 0, 1, 1, 0, 0]
    """
    after = functools.partial(jnp.roll, shift=-1, axis=1)
    learned = after(mask) & (after(segments) == segments) & (segments > 0)
    return after(tokens), learned.at[:, -1].set(False)


def logprobs(
    features: Float[Array, "B T D"],
    table: Float[Array, "V D"],
    targets: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    scale: float = 1.0,
    soft_cap: float | None = None,
    temperature: float = 1.0,
    chunk: int | None = None,
) -> Float[Array, "B T"]:
    """log softmax(scores / temperature)[target], float32, for the tokens in `mask`; 0 for the others.

        scores = scale features table^T, or soft_cap tanh(that / soft_cap)

    Args:
      features: the model's last hidden states.
      table: the output layer, a row a token.
      targets: the token each position predicts, from `shift`.
      mask: which positions count; the others cost nothing.
      scale: of the scores.
      soft_cap: bounds them (Gemma 2, arXiv:2408.00118, section 2).
      temperature: that of the sampler, where tokens were drawn at another one than 1.
      chunk: tokens whose logits exist at one time, so memory is chunk x V floats; by default what suits the backend.

    Raises:
      ValueError: the temperature is not above 0.

    Example:
      >>> features, table = jnp.ones((1, 3, 2)), jnp.zeros((5, 2))
      >>> lp = logprobs(features, table, jnp.array([[1, 2, 3]]), jnp.array([[True, True, False]]))
      >>> [round(float(x), 3) for x in lp[0]]  # one of five, all equally likely: log 1/5
      [-1.609, -1.609, 0.0]
    """
    return _ordered(features, table, targets, mask, (scale, soft_cap, temperature), chunk, "none")[0]


def entropies(
    features: Float[Array, "B T D"],
    table: Float[Array, "V D"],
    targets: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    scale: float = 1.0,
    soft_cap: float | None = None,
    temperature: float = 1.0,
    chunk: int | None = None,
    learned: bool = True,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Log-probabilities, and the entropy -sum_v p_v log p_v of each position's whole distribution, in one pass.

    Args:
      features, table, targets, mask, scale, soft_cap, temperature, chunk: as for `logprobs`.
      learned: whether the entropy has a gradient. For a bonus in the loss it must; where it is only shown, the backward
        pass is as cheap without as that of `logprobs`.

    Returns:
      (log-probabilities, entropies), float32 in nats; 0 for tokens outside of `mask`. An entropy is never below 0.

    Raises:
      ValueError: the temperature is not above 0.

    Example:
      >>> features, table = jnp.ones((1, 3, 2)), jnp.zeros((5, 2))
      >>> lp, entropy = entropies(features, table, jnp.array([[1, 2, 3]]), jnp.array([[True, True, False]]))
      >>> [round(float(x), 3) for x in entropy[0]]  # one of five, all equally likely: log 5
      [1.609, 1.609, 0.0]
    """
    kind = "learned" if learned else "seen"
    lp, entropy = _ordered(features, table, targets, mask, (scale, soft_cap, temperature), chunk, kind)
    return lp, entropy if learned else jax.lax.stop_gradient(entropy)


Entropy = Literal["none", "seen", "learned"]  # not computed, without a gradient, with one


def _ordered(features, table, targets, mask, bent, chunk, entropy):
    """The log-probabilities, and the entropies or None, of rows that are compacted and put back."""
    if bent[-1] <= 0:
        raise ValueError(f"temperature is {bent[-1]}; scores are divided by it, so it must be above 0")
    rows = compact(mask, chunk)
    # Along the row, so that rows which lie on different devices stay there.
    features = jnp.take_along_axis(features, rows.order[..., None], axis=1)
    targets = jnp.take_along_axis(targets, rows.order, axis=1)
    found: Any = _compact(features, table, targets, rows.counts, Head(rows.width, *bent), entropy)
    return jax.tree.map(lambda x: jnp.take_along_axis(x, rows.back, axis=1), found)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _compact(features, table, targets, mask, head, entropy):
    return _forward(features, table, targets, mask, head, entropy, grad=False)[:2]


class Softmax(NamedTuple):
    """The distributions of a chunk's tokens."""

    shifted: Float[Array, "B t V"]  # scores below the highest
    weights: Float[Array, "B t V"]  # their exponentials
    total: Float[Array, "B t 1"]  # of the weights, at least 1
    hit: Bool[Array, "B t V"]  # the target
    slope: Array | float  # d scores / d products

    @property
    def logprobs(self) -> Float[Array, "B t"]:
        return jnp.where(self.hit, self.shifted, 0).sum(axis=-1) - jnp.log(self.total[..., 0])

    @property
    def entropies(self) -> Float[Array, "B t"]:
        """log total - sum_v p_v shifted_v: two terms of which neither is below 0."""
        return jnp.log(self.total[..., 0]) - (self.weights * self.shifted).sum(axis=-1) / self.total[..., 0]


def _softmax(features, table, targets, head):
    logits, slope = scores(features, table, head)
    shifted = logits - logits.max(axis=-1, keepdims=True)
    weights = jnp.exp(shifted)
    # A comparison instead of a gather: it fuses, and a table cut over the vocabulary stays cut.
    hit = jnp.arange(table.shape[0]) == targets[..., None]
    return Softmax(shifted, weights, weights.sum(axis=-1, keepdims=True), hit, slope)


def _pull(softmax, of_lp=1.0, of_entropy=None):
    """What cotangents of lp and entropy make of the products.

    d lp / d scores = one-hot(target) - p;  d entropy / d scores = -p (log p + entropy)
    """
    p = softmax.weights / softmax.total
    pull = of_lp * (jnp.where(softmax.hit, 1.0, 0.0) - p)
    if of_entropy is not None:
        surprise = softmax.shifted - jnp.log(softmax.total) + softmax.entropies[..., None]
        pull -= of_entropy * p * surprise
    return pull * softmax.slope


def _forward(features, table, targets, mask, head, entropy, grad):
    def step(carry, take):
        counts = take(mask)
        f = jnp.where(counts[..., None], take(features), 0)  # whatever a masked token holds
        softmax = _softmax(f, table, take(targets), head)
        lp = jnp.where(counts, softmax.logprobs, 0.0)
        spread = None if entropy == "none" else jnp.where(counts, softmax.entropies, 0.0)
        if not grad:
            return carry, (lp, spread, None)
        pull = jnp.einsum("btv,vd->btd", _pull(softmax).astype(f.dtype), table.astype(f.dtype))
        return carry, (lp, spread, jnp.where(counts[..., None], pull, 0))

    return chunks(step, (), mask, head.width)[1]


class Again(NamedTuple):
    """What the backward pass needs to compute the softmax again."""

    features: Float[Array, "B Tc D"]
    table: Float[Array, "V D"]
    targets: Int[Array, "B Tc"]
    mask: Bool[Array, "B Tc"]
    trains: tuple | None  # (): the table does. A structure, since a value would be traced


def _vjp_forward(features, table, targets, mask, head, entropy):
    trains = table.perturbed  # decided while tracing: a frozen table needs nothing kept but the pull
    given = features.value, table.value, targets.value, mask.value
    if trains or entropy == "learned":
        found = _forward(*given, head, entropy, grad=False)
        return found[:2], Again(*given, trains=() if trains else None)
    *found, pull = _forward(*given, head, entropy, grad=True)
    return tuple(found), pull


def _vjp_backward(head, entropy, kept, cotangents):
    zero = lambda g: isinstance(g, jax.custom_derivatives.SymbolicZero)
    of_lp, of_entropy = (jnp.zeros(g.shape, jnp.float32) if zero(g) else g for g in cotangents)
    if not isinstance(kept, Again):
        return (of_lp[..., None] * kept).astype(kept.dtype), None, None, None
    features, table, targets, mask, trains = kept
    given = [of_lp] if entropy != "learned" else [of_lp, of_entropy]
    given = [jnp.where(mask, g, 0.0) for g in given]

    def step(grad_table, take):
        f = jnp.where(take(mask)[..., None], take(features), 0)
        softmax = _softmax(f, table, take(targets), head)
        pull = _pull(softmax, *(take(g)[..., None] for g in given)).astype(f.dtype)
        if trains is not None:
            grad_table += jnp.einsum("btv,btd->vd", pull, f, preferred_element_type=jnp.float32)
        return grad_table, jnp.einsum("btv,vd->btd", pull, table.astype(f.dtype))

    start = None if trains is None else jnp.zeros(table.shape, jnp.float32)
    grad_table, grad_features = chunks(step, start, mask, head.width)
    return grad_features, None if trains is None else grad_table.astype(table.dtype), None, None


_compact.defvjp(_vjp_forward, _vjp_backward, symbolic_zeros=True)
