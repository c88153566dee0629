"""What an adapter adds to a layer, told by the leaves that lie at the layer's address in the collection "lora".

    a, b, scale   y = x W + scale (x A) B                            Hu et al. 2021, arXiv:2106.09685, eq. 3
    a0, b0        y = x W + scale ((x A) B - (x A0) B0), constants   PiSSA: Meng et al. 2024, arXiv:2404.02948, eq. 2-4
    m             y m / |W + scale (A B - A0 B0)|, each column       DoRA: Liu et al. 2024, arXiv:2402.09353, eq. 5

A product with A comes first, so the full-size A B is never formed. The functions are written over stacks: axes before
the last two of W, A and B are carried along. Nothing here needs Flax.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxsft import narrow, quant
from jaxsft.types import Key

Leaves = Mapping[str, Array]  # of one layer: a, b, scale, and what else it has; empty without an adapter
Drop = Callable[[Array], Array]


def dropout(rate: float, key: Key | None) -> Drop | None:
    """Dropout at some rate (Srivastava et al. 2014, section 4); none without a key, as in evaluation."""
    if not rate or key is None:
        return None
    return lambda x: jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0)


def project(
    x: Float[Array, "... T I"],
    kernel: Float[Array, "... I O"] | Mapping[str, Array],
    leaves: Leaves,
    drop: Drop | None = None,
    inner: Float[Array, "... T R"] | None = None,
) -> Float[Array, "... T O"]:
    """x W and what the adapter adds to it; a bias is the caller's.

    Args:
      x: inputs.
      kernel: W, frozen or not, or what `quant.pack` made of it.
      leaves: the adapter of this layer.
      drop: dropout on the adapter's input, while training. With m it is PEFT's: what m changes of x W is dropped too.
      inner: x A, where it was computed already; see `inners`.

    Example:
      >>> x, kernel = jnp.ones((1, 2)), jnp.array([[2.5], [3.5]])
      >>> low = {"a": jnp.ones((2, 1)), "b": jnp.ones((1, 1)), "scale": jnp.float32(0.5)}
      >>> float(project(x, kernel, low)[0, 0]), float(project(x, kernel, low | {"m": jnp.array([10.0])})[0, 0])
      (7.0, 14.0)
    """
    times = lambda x: quant.product(x, kernel) if isinstance(kernel, Mapping) else narrow.product(x, kernel)
    if not leaves:
        return times(x)
    low = {name: leaf.astype(x.dtype) for name, leaf in leaves.items()}
    out = lambda inner, b: narrow.product(inner * low["scale"][..., None, None], b)
    own = lambda x: times(x) - out(narrow.product(x, low["a0"]), low["b0"]) if "a0" in low else times(x)
    dropped = x if drop is None else drop(x)
    y, change = own(x), out(narrow.product(dropped, low["a"]) if inner is None else inner, low["b"])
    if "m" not in low:
        return y + change
    # In float32, and rounded once: bfloat16 cannot tell a factor of 1.003 from 1.
    whole = quant.unpack(kernel) if isinstance(kernel, Mapping) else kernel
    factor, full = factors(whole, leaves)[..., None, :], lambda x: x.astype(jnp.float32)
    if drop is None:
        return (factor * full(y + change)).astype(x.dtype)
    return (full(y) + (factor - 1) * full(own(dropped)) + factor * full(change)).astype(x.dtype)


def inners(x: Float[Array, "N I"], lora: Mapping[str, Leaves]) -> dict[str, Float[Array, "N r"]]:
    """x A of several layers that read the same x, in one product: one with few columns takes as long as with more.

    Args:
      x: what they read.
      lora: their adapters, whose ranks may differ.

    Example:
      >>> low = {"q": {"a": jnp.ones((2, 1))}, "k": {"a": jnp.zeros((2, 3))}}
      >>> {name: inner.tolist() for name, inner in inners(jnp.ones((1, 2)), low).items()}
      {'q': [[2.0]], 'k': [[0.0, 0.0, 0.0]]}
    """
    if not lora:
        return {}
    columns = [leaves["a"].astype(x.dtype) for leaves in lora.values()]
    ends = np.cumsum([a.shape[-1] for a in columns])
    return dict(
        zip(lora, jnp.split(narrow.product(x, jnp.concatenate(columns, axis=-1)), ends[:-1], axis=-1), strict=True)
    )


def factors(kernel: Float[Array, "... I O"], leaves: Leaves) -> Float[Array, "... O"]:
    """m / |W + scale (A B - A0 B0)| of each column, float32; the norm is a constant of the gradient (section 4.3).

    |w + c|^2 = w w + 2 w c + c c, whose parts need no array of the size of W.
    """
    a, b = pairs(leaves)
    scale, exact = leaves["scale"][..., None], jax.lax.Precision.HIGHEST
    inner = jnp.einsum("...ir,...io->...ro", a, kernel, precision=exact, preferred_element_type=jnp.float32)
    squares = jnp.matmul(jnp.swapaxes(a, -1, -2), a, precision=exact)
    squares = jnp.matmul(squares, b, precision=exact)
    norm = jnp.square(kernel.astype(jnp.float32)).sum(-2)
    norm = norm + 2 * scale * (inner * b).sum(-2) + scale**2 * (squares * b).sum(-2)
    norm = jnp.sqrt(jnp.maximum(norm, jnp.finfo(jnp.float32).tiny))  # an unused token's row may be all zeros
    return leaves["m"] / jax.lax.stop_gradient(norm)


def pairs(leaves: Leaves) -> tuple[Float[Array, "... I R"], Float[Array, "... R O"]]:
    """A and B of the whole change, [A, A0] and [B; -B0], so that it is scale A B."""
    a, b = leaves["a"], leaves["b"]
    if "a0" not in leaves:
        return a, b
    return jnp.concatenate([a, leaves["a0"]], axis=-1), jnp.concatenate([b, -leaves["b0"]], axis=-2)


def lookup(
    table: Float[Array, "V D"], tokens: Int[Array, "B T"], leaves: Leaves, dtype: jax.typing.DTypeLike
) -> Float[Array, "B T D"]:
    """The tokens' rows of W + scale A B; A and B of an embedding are [V, r] and [r, D], and nothing is dropped."""
    # A token that the table has no row for is NaN, which training refuses, and not the table's last row.
    there = (tokens < len(table)) & (tokens >= -len(table))
    rows = narrow.moved(lambda table, tokens: table[tokens], table, tokens).astype(dtype)
    rows = jnp.where(there[..., None], rows, jnp.nan)
    if not leaves:
        return rows
    a, b = pairs(leaves)
    rows = rows + (a[tokens].astype(dtype) * leaves["scale"].astype(dtype)) @ b.astype(dtype)
    return rows if "m" not in leaves else (factors(table, leaves) * rows.astype(jnp.float32)).astype(dtype)


def widen(features: Float[Array, "B T D"], leaves: Leaves, drop: Drop | None = None) -> Float[Array, "B T E"]:
    """Features that meet a `wide` table: [f, scale f A], so that losses and samplers need not know of an adapter."""
    if not leaves:
        return features
    scale, dropped = leaves["scale"].astype(features.dtype), features if drop is None else drop(features)
    parts = [features, scale * (dropped @ leaves["a"].astype(features.dtype))]
    parts += [scale * (features @ leaves["a0"].astype(features.dtype))] if "a0" in leaves else []
    return jnp.concatenate(parts, axis=-1)


def wide(table: Float[Array, "V D"], leaves: Leaves) -> Float[Array, "V E"]:
    """The output layer with its adapter, [W, B^T]: A and B are [D, r] and [r, V]. With m, its rows times the factors.

    It is a new array of V (D + r) numbers in each step, and since B trains, so does all of it for `losses.logprobs`.
    """
    if not leaves:
        return table
    wider = jnp.concatenate([table, pairs(leaves)[1].T.astype(table.dtype)], axis=-1)
    if "m" not in leaves:
        return wider
    return (factors(table.T, leaves)[:, None] * wider.astype(jnp.float32)).astype(table.dtype)
