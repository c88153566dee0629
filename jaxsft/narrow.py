"""bfloat16 on a CPU, whose compiler computes and moves it as float32 unless it is asked in the right way.

It multiplies matrices of bfloat16 as such (two to three times as fast as float32, on a processor that can) only where
the result is float32. And it slices and updates an array of bfloat16 as one of float32, for which it copies the whole:
the weights of all layers before a scan, and at each of its steps all that the scan stacks, so that a model's time grows
with the square of its depth. As integers of 16 bits the same numbers are moved as they are.

What is here gives what the plain operation gives, values and gradients. For float32, and on a GPU or TPU, it is the
plain operation.
"""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

_STANDS_IN = contextvars.ContextVar("stands_in", default=False)


@contextlib.contextmanager
def stands_in(yes: bool = True) -> Iterator[None]:
    """Within it, CPU devices stand for others, whose compilers need none of this: all here is the plain operation.

    Example:
      >>> with stands_in():
      ...     jax.make_jaxpr(product)(jnp.ones((1, 2), jnp.bfloat16), jnp.ones((2, 1), jnp.bfloat16)).eqns[-1].primitive
      dot_general
    """
    before = _STANDS_IN.set(yes)
    try:
        yield
    finally:
        _STANDS_IN.reset(before)


def _is_narrow(*arrays: Array) -> bool:
    here = jax.default_backend() == "cpu" and not _STANDS_IN.get()
    return here and all(x.dtype == jnp.bfloat16 for x in arrays)


def product(x: Float[Array, "... I"], kernel: Float[Array, "I O"]) -> Float[Array, "... O"]:
    """x W, summed in float32 and rounded once to the dtype of `x`; its gradients likewise.

    Example:
      >>> product(jnp.ones((1, 2), jnp.bfloat16), jnp.full((2, 1), 2, jnp.bfloat16))
      Array([[4]], dtype=bfloat16)
    """
    return _product(x, kernel) if _is_narrow(x, kernel) and kernel.ndim == 2 else x @ kernel


def _rounded(x: Array, y: Array, over: tuple[tuple[int, ...], tuple[int, ...]]) -> Array:
    return jax.lax.dot_general(x, y, (over, ((), ())), preferred_element_type=jnp.float32).astype(x.dtype)


@jax.custom_vjp
def _product(x: Array, kernel: Array) -> Array:
    return _rounded(x, kernel, ((x.ndim - 1,), (0,)))


def _product_fwd(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return _product(x, kernel), (x, kernel)


def _product_bwd(kept: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, kernel = kept
    rows = tuple(range(x.ndim - 1))
    return _rounded(dy, kernel, ((dy.ndim - 1,), (1,))), _rounded(x, dy, (rows, rows))


_product.defvjp(_product_fwd, _product_bwd)


def moved(move: Callable[..., Array], x: Array, *more: Array) -> Array:
    """`move(x, *more)`, of something that only moves or names the numbers of `x`, such as a slice.

    Args:
      move: gives an array of the dtype of `x`.
      x: what is moved.
      more: where to, say; or numbers of the dtype of `x` that are put among its own.

    Example:
      >>> moved(lambda x, i: x[i], jnp.arange(3, dtype=jnp.bfloat16), jnp.int32(2))
      Array(2, dtype=bfloat16)
    """
    return _moved(move, x, *more) if _is_narrow(x) else move(x, *more)


def _as_bits(move: Callable[..., Array], *given: Array) -> Array:
    bits = [jax.lax.bitcast_convert_type(x, jnp.uint16) if _is_narrow(x) else x for x in given]
    return jax.lax.bitcast_convert_type(move(*bits), jnp.bfloat16)


_moved = jax.custom_jvp(_as_bits, nondiff_argnums=(0,))


@_moved.defjvp
def _moved_jvp(move: Callable[..., Array], given: tuple, tangents: tuple) -> tuple[Array, Array]:
    return _as_bits(move, *given), jax.jvp(move, given, tangents)[1]


def scan(layer: Callable[[Array, Any], tuple[Array, Any]], x: Array, stacks: Any, wrap: Callable = lambda f: f):
    """`jax.lax.scan(wrap(layer), x, stacks)`, for a carry that is one array.

    Args:
      layer: (x, row) -> (x, out).
      x: what goes through the layers; between them it is float32, which stacks well.
      stacks: arrays [L, ...], of which a row is a layer's.
      wrap: see `remat.rematerialise`; it wraps the slicing as well, so no row is kept for the backward pass.

    Example:
      >>> float(scan(lambda x, w: (x * w, None), jnp.bfloat16(3), jnp.array([2, 4], jnp.bfloat16))[0])
      24.0
    """
    leaves, form = jax.tree.flatten(stacks)
    if not _is_narrow(x):
        return jax.lax.scan(wrap(layer), x, stacks)
    narrow = {i: leaf for i, leaf in enumerate(leaves) if _is_narrow(leaf)}
    others = [leaf for i, leaf in enumerate(leaves) if i not in narrow]

    def step(wide: Array, row: tuple) -> tuple[Array, Any]:
        at, others = row
        rest = iter(others)
        slices = lambda stack: moved(functools.partial(jax.lax.dynamic_index_in_dim, keepdims=False), stack, at)
        own = [slices(narrow[i]) if i in narrow else next(rest) for i in range(len(leaves))]
        y, out = layer(wide.astype(x.dtype), jax.tree.unflatten(form, own))
        return y.astype(jnp.float32), out

    y, out = jax.lax.scan(wrap(step), x.astype(jnp.float32), (jnp.arange(len(leaves[0])), others))
    return y.astype(x.dtype), out
