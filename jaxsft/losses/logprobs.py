"""Log-probabilities of tokens from features, without the [B, T, V] array of logits.

Chunks of the tokens that count meet blocks of the output table one after the other (chunks.py), and a block leaves of
the softmax a maximum and sums (softmax.py). Products run in the dtype of the features with float32 accumulation, the
softmax in float32. The gradient is written by hand:

    d lp / d f = W_y - sum_v p_v W_v    per token: formed in the forward pass, scaled in the backward pass
    d lp / d W needs the softmax again, and is only computed where the table trains

The sum is one more running sum, as attention has it over values, so a frozen table is read once. The entropy of the
whole distribution comes of the same pass. Where it is to have a gradient, too, the scores are made again for both: two
gradients of every token would be kept otherwise.

On a mesh (shards.py) each device has its own tokens, of which it leaves out those that do not count, and its own rows
of the table. What the devices of `tensor` have seen of the same tokens is added up once, after all: three numbers a
token, and the gradient to its features.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from jaxsft.losses import softmax
from jaxsft.losses.chunks import Chunk, Head, Table, compact, over_tokens, vocabulary
from jaxsft.losses.shards import shards
from jaxsft.losses.softmax import Found, Token


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
    table: Table,
    targets: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    scale: float = 1.0,
    soft_cap: float | None = None,
    temperature: float = 1.0,
    chunk: Chunk | None = None,
    mesh: Mesh | None = None,
) -> Float[Array, "B T"]:
    """log softmax(scores / temperature)[target], float32, for the tokens in `mask`; 0 for the others.

        scores = scale features table^T, or soft_cap tanh(that / soft_cap)

    Args:
      features: the model's last hidden states.
      table: the output layer [V, D], a row a token; or that packed, `quant.pack(table.T, "int8")`.
      targets: the token each position predicts, from `shift`.
      mask: which positions count; the others cost nothing.
      scale: of the scores.
      soft_cap: bounds them (Gemma 2, arXiv:2408.00118, section 2).
      temperature: that of the sampler, where tokens were drawn at another one than 1.
      chunk: tokens and rows of the table whose scores exist at one time; by default what suits the backend.
      mesh: where features and table lie, if on several devices: rows over all axes but "context", which cuts T, and
        "tensor", which cuts V. An axis that does not divide its dimension cuts nothing.

    Raises:
      ValueError: the temperature is not above 0.

    Example:
      >>> features, table = jnp.ones((1, 3, 2)), jnp.zeros((5, 2))
      >>> lp = logprobs(features, table, jnp.array([[1, 2, 3]]), jnp.array([[True, True, False]]))
      >>> [round(float(x), 3) for x in lp[0]]  # one of five, all equally likely: log 1/5
      [-1.609, -1.609, 0.0]
    """
    return everything(features, table, targets, mask, Head(scale, soft_cap, temperature, chunk, mesh)).logprobs


def entropies(
    features: Float[Array, "B T D"],
    table: Table,
    targets: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    temperature: float = 1.0,
    learned: bool = True,
    **head: Any,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Log-probabilities, and the entropy -sum_v p_v log p_v of each position's whole distribution, in one pass.

    Args:
      features, table, targets, mask, temperature: as for `logprobs`.
      learned: whether the entropy has a gradient. For a bonus in the loss it must; where it is only shown, the backward
        pass is as cheap without as that of `logprobs`.
      head: scale, soft_cap, chunk and mesh of `logprobs`.

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
    want = frozenset({"entropy", "learned"} if learned else {"entropy"})
    found = everything(features, table, targets, mask, Head(temperature=temperature, **head), want)
    return found.logprobs, found.entropy


def top1(
    features: Float[Array, "B T D"],
    table: Table,
    targets: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    **head: Any,
) -> tuple[Float[Array, "B T"], Int[Array, "B T"]]:
    """Log-probabilities, and the token that is the most likely at each position, in one pass.

    Args:
      features, table, targets, mask: as for `logprobs`.
      head: scale, soft_cap, chunk and mesh of `logprobs`.

    Returns:
      (log-probabilities, tokens): of tokens as likely the first one; 0 outside of `mask`.

    Example:
      >>> features, table = jnp.ones((1, 2, 1)), jnp.array([[0.0], [2.0], [1.0]])
      >>> top1(features, table, jnp.array([[1, 2]]), jnp.array([[True, True]]))[1].tolist()
      [[1, 1]]
    """
    found = everything(features, table, targets, mask, Head(**head), frozenset({"top1"}))
    return found.logprobs, found.top1


def everything(
    features: Float[Array, "B T D"],
    table: Table,
    targets: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    head: Head,
    want: frozenset[str] = frozenset(),
) -> Found:
    """The one operation: log-probabilities, and what else is in `want`, of the fields of `Found`; 0 outside of `mask`.

    With "learned" the entropy has a gradient, too; nothing else but the log-probabilities has one.
    """
    if head.temperature <= 0:
        raise ValueError(f"temperature is {head.temperature}; scores are divided by it, so it must be above 0")
    operation = jax.jit(_operation, static_argnums=(4, 5))  # a mesh needs it where the caller has no jit
    found: Any = operation(features, table, targets, mask, head, want)
    seen = jax.lax.stop_gradient(found)
    return seen._replace(logprobs=found.logprobs, entropy=found.entropy if "learned" in want else seen.entropy)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _operation(features, table, targets, mask, head: Head, want: frozenset[str]) -> Found:
    return _forward(features, table, targets, mask, head, want, "nothing")[0]


class Again(NamedTuple):
    """What the backward pass needs to compute the softmax again."""

    features: Float[Array, "B T D"]
    table: Table
    targets: Int[Array, "B T"]
    mask: Bool[Array, "B T"]
    logsumexp: Float[Array, "B T"]
    entropy: Float[Array, "B T"] | None
    trains: tuple | None  # (): the table does. A structure, since a value would be traced


def _vjp_forward(features, table, targets, mask, head: Head, want):
    trains = is_given(table) and table.perturbed  # decided while tracing: a frozen table needs nothing but the pull
    values: Any = jax.tree.map(lambda x: x.value, (features, table, targets, mask), is_leaf=is_given)
    features, table, targets, mask = values
    if trains or "learned" in want:
        found, logsumexp = _forward(features, table, targets, mask, head, want, "logsumexp")
        entropy = found.entropy if "learned" in want else None
        return found, Again(features, table, targets, mask, logsumexp, entropy, trains=() if trains else None)
    return _forward(features, table, targets, mask, head, want, "pull")


def _vjp_backward(head: Head, want, kept, cotangents: Found):
    zero = lambda x: isinstance(x, jax.custom_derivatives.SymbolicZero)
    given = lambda x: jnp.zeros(x.shape, jnp.float32) if zero(x) else x
    if not isinstance(kept, Again):
        return (given(cotangents.logprobs)[..., None] * kept).astype(kept.dtype), None, None, None
    of_entropy = given(cotangents.entropy) if "learned" in want else None
    token = Token(kept.features, kept.targets, kept.logsumexp, given(cotangents.logprobs), kept.entropy, of_entropy)
    return *_backward(token, kept.mask, kept.table, head, trains=kept.trains is not None), None, None


_operation.defvjp(_vjp_forward, _vjp_backward, symbolic_zeros=True)


def is_given(x: Any) -> bool:
    """Whether it is what a custom gradient with symbolic zeros gets for an array, with whether that is learned."""
    return isinstance(x, jax.custom_derivatives.CustomVJPPrimal)


def _forward(features, table, targets, mask, head: Head, want, keep: str) -> tuple[Found, Any]:
    """What is wanted, and what is to be kept: "nothing", the "logsumexp", or the "pull" on the features."""
    where = shards(head.mesh, mask.shape, vocabulary(table))

    def local(features, targets, mask, table):
        rows, offset = compact(mask.ravel(), head.block.tokens), where.offset(table)
        flat = lambda x: x.reshape(mask.size, *x.shape[2:])
        features, targets, shape = flat(features), flat(targets) - offset, mask.shape

        def step(carry, start):
            y = rows.take(targets, start)
            seen = softmax.look(rows.take(features, start), y, table, head, want, mix=keep == "pull")
            if keep == "pull" and not where.tensor:
                seen = seen._replace(mixed=softmax.pull(seen, y, table, head, features.dtype).astype(features.dtype))
            return carry, seen

        seen = over_tokens(step, (), rows)[1]
        if where.tensor:
            seen = softmax.together(seen, where.tensor, offset)
            if keep == "pull":
                share = softmax.pull(seen, targets[rows.order], table, head, features.dtype)
                seen = seen._replace(mixed=jax.lax.psum(share.astype(features.dtype), where.tensor))
        kept = {"nothing": None, "logsumexp": seen.logsumexp, "pull": seen.mixed}[keep]
        return jax.tree.map(lambda x: rows.back(x).reshape(*shape, *x.shape[1:]), (seen.found(), kept))

    return where.run(local, (features, targets, mask), table, where.tokens, features.dtype)


def _backward(token: Token, mask, table, head: Head, trains: bool):
    where, kind = shards(head.mesh, mask.shape, vocabulary(table)), token.features.dtype

    def local(token: Token, mask, table):
        rows, offset = compact(mask.ravel(), head.block.tokens), where.offset(table)
        flat = jax.tree.map(lambda x: x.reshape(mask.size, *x.shape[2:]), token)
        flat = flat._replace(target=flat.target - offset)

        def step(grad_table, start):
            part = jax.tree.map(lambda x: rows.take(x, start), flat)
            grad_table, grad_features = softmax.pull_again(grad_table, part, table, head)
            return grad_table, grad_features if where.tensor else grad_features.astype(kind)

        start = jnp.zeros(table.shape, jnp.float32) if trains else None
        grad_table, grad_features = over_tokens(step, start, rows)
        if where.tensor:
            grad_features = jax.lax.psum(grad_features.astype(kind), where.tensor)
        grad_features = rows.back(grad_features).reshape(token.features.shape)
        return grad_features, where.summed(grad_table) if trains else None

    out = where.tokens, PartitionSpec(where.tensor, where.split(table.shape[1])) if trains else None
    grad_features, grad_table = where.run(local, (token, mask), table, out, kind)
    return grad_features, grad_table.astype(table.dtype) if trains else None
