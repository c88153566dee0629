"""Log-probabilities of tokens from features, without the [B, T, V] array of logits.

Rows are first compacted so that the tokens that count come first; then chunks of tokens meet the output table one after
the other, and chunks that hold none are skipped. Products run in the dtype of the features with float32 accumulation,
the softmax in float32. The gradient is written by hand:

    d lp / d f = W_y - sum_v p_v W_v    per token: formed in the forward pass, scaled in the backward pass
    d lp / d W needs the chunk's softmax again, and is only computed where the table trains
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class Head(NamedTuple):
    """What makes scores of the products of features and table, and how many tokens meet the table at one time."""

    width: int  # tokens of each row
    scale: float = 1.0
    soft_cap: float | None = None


CHUNK_CPU, CHUNK = 256, 4096  # tokens whose logits exist at one time; a CPU's cache likes few


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
    chunk: int | None = None,
) -> Float[Array, "B T"]:
    """log softmax(scores)[target], float32, for the tokens in `mask`; 0 for the others.

        scores = scale features table^T, or soft_cap tanh(that / soft_cap)

    Args:
      features: the model's last hidden states.
      table: the output layer, a row a token.
      targets: the token each position predicts, from `shift`.
      mask: which positions count; the others cost nothing.
      scale: of the scores.
      soft_cap: bounds them (Gemma 2, arXiv:2408.00118, section 2).
      chunk: tokens whose logits exist at one time, so memory is chunk x V floats; by default what suits the backend.

    Example:
      >>> features, table = jnp.ones((1, 3, 2)), jnp.zeros((5, 2))
      >>> lp = logprobs(features, table, jnp.array([[1, 2, 3]]), jnp.array([[True, True, False]]))
      >>> [round(float(x), 3) for x in lp[0]]  # one of five, all equally likely: log 1/5
      [-1.609, -1.609, 0.0]
    """
    rows = compact(mask, chunk)
    # Along the row, so that rows which lie on different devices stay there.
    features = jnp.take_along_axis(features, rows.order[..., None], axis=1)
    targets = jnp.take_along_axis(targets, rows.order, axis=1)
    lp: Any = _compact(features, table, targets, rows.counts, Head(rows.width, scale, soft_cap))
    return jnp.take_along_axis(lp, rows.back, axis=1)


class Compact(NamedTuple):
    """How rows are reordered so that the tokens that count come first, and filled up to whole chunks."""

    order: Int[Array, "B Tc"]  # where each token stood
    back: Int[Array, "B T"]  # where each token went
    counts: Bool[Array, "B Tc"]  # true for a prefix of each row
    width: int  # tokens of each row in a chunk


def compact(mask: Bool[Array, "B T"], chunk: int | None) -> Compact:
    """The order for `mask`, in chunks of `chunk` tokens, or of what suits the backend."""
    B, T = mask.shape
    chunk = chunk or (CHUNK_CPU if jax.default_backend() == "cpu" else CHUNK)
    width = min(T, max(1, chunk // B))
    order = jnp.argsort(~mask, axis=1, stable=True)
    back = jnp.argsort(order, axis=1)
    order = jnp.pad(order, ((0, 0), (0, -T % width)), mode="edge")
    return Compact(order, back, jnp.arange(order.shape[1]) < mask.sum(axis=1, keepdims=True), width)


def scores(features: Float[Array, "B t D"], table: Float[Array, "V D"], head: Head) -> tuple[Array, Array | float]:
    """Scores of every token of the vocabulary, float32 [B, t, V], and d scores / d products of features and table."""
    logits = jnp.einsum("btd,vd->btv", features, table.astype(features.dtype), preferred_element_type=jnp.float32)
    slope = head.scale
    if head.scale != 1:
        logits = logits * head.scale
    if head.soft_cap is not None:
        bent = jnp.tanh(logits / head.soft_cap)
        logits, slope = head.soft_cap * bent, slope * (1 - bent * bent)
    return logits, slope


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _compact(features, table, targets, mask, head):
    return _forward(features, table, targets, mask, head, grad=False)[0]


def _softmax(features, table, targets, head):
    """lp of the targets, and d lp / d products: one-hot(target) - softmax, times the slope of the scores."""
    logits, slope = scores(features, table, head)
    shifted = logits - logits.max(axis=-1, keepdims=True)
    total = jnp.exp(shifted).sum(axis=-1, keepdims=True)
    # A comparison instead of a gather: it fuses, and a table cut over the vocabulary stays cut.
    hit = jnp.arange(table.shape[0]) == targets[..., None]
    lp = jnp.where(hit, shifted, 0).sum(axis=-1) - jnp.log(total[..., 0])
    pull = jnp.where(hit, 1.0, 0.0) - jnp.exp(shifted) / total
    return lp, pull if head == Head(head.width) else pull * slope


def chunks(step: Any, carry: Any, mask: Bool[Array, "B Tc"], width: int) -> tuple[Any, Any]:
    """Scans `step(carry, take)` over chunks of tokens, skipping those that hold no token that counts."""

    def body(carry, start):
        take: Any = lambda x: jax.lax.dynamic_slice_in_dim(x, start, width, axis=1)
        skip = lambda carry: (carry, jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shape))
        run = lambda carry: step(carry, take)
        shape = jax.eval_shape(run, carry)[1]
        return jax.lax.cond(take(mask).any(), run, skip, carry)

    carry, out = jax.lax.scan(body, carry, jnp.arange(0, mask.shape[1], width))
    join = lambda x: jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])
    return carry, jax.tree.map(join, out)  # [chunks, B, width, ...] -> [B, T, ...]


def _forward(features, table, targets, mask, head, grad):
    def step(carry, take):
        f = jnp.where(take(mask)[..., None], take(features), 0)  # whatever a masked token holds
        lp, slope = _softmax(f, table, take(targets), head)
        lp = jnp.where(take(mask), lp, 0.0)
        if not grad:
            return carry, (lp,)
        pull = jnp.einsum("btv,vd->btd", slope.astype(f.dtype), table.astype(f.dtype))
        return carry, (lp, jnp.where(take(mask)[..., None], pull, 0))

    return chunks(step, (), mask, head.width)[1]


def _vjp_forward(features, table, targets, mask, head):
    trains = table.perturbed  # decided while tracing: a frozen table needs nothing kept but the pull
    features, table, targets, mask = features.value, table.value, targets.value, mask.value
    if trains:
        (lp,) = _forward(features, table, targets, mask, head, grad=False)
        return lp, (features, table, targets, mask)
    lp, pull = _forward(features, table, targets, mask, head, grad=True)
    return lp, pull


def _vjp_backward(head, kept, cotangent):
    if isinstance(cotangent, jax.custom_derivatives.SymbolicZero):
        cotangent = jnp.zeros(cotangent.shape, jnp.float32)
    if not isinstance(kept, tuple):
        return (cotangent[..., None] * kept).astype(kept.dtype), None, None, None
    features, table, targets, mask = kept
    g = jnp.where(mask, cotangent, 0.0)

    def step(grad_table, take):
        f = jnp.where(take(mask)[..., None], take(features), 0)
        slope = (_softmax(f, table, take(targets), head)[1] * take(g)[..., None]).astype(f.dtype)
        grad_table += jnp.einsum("btv,btd->vd", slope, f, preferred_element_type=jnp.float32)
        return grad_table, jnp.einsum("btv,vd->btd", slope, table.astype(f.dtype))

    grad_table, grad_features = chunks(step, jnp.zeros(table.shape, jnp.float32), mask, head.width)
    return grad_features, grad_table.astype(table.dtype), None, None


_compact.defvjp(_vjp_forward, _vjp_backward, symbolic_zeros=True)
