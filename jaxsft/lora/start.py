"""Where an adapter starts, and the leaves of it that never train.

However A and B start, the adapted model starts as the base: with B A = 0, or with what they start at subtracted.
PiSSA's and OLoRA's papers put it into the base, W - scale A0 B0. Here W stays as it is, and A0, B0 are two constants:

    x W + scale ((x A) B - (x A0) B0)

so the base on the disk is the base of the model, merging is exact, and the change is an ordinary LoRA of rank 2r.
"""

import functools
import math
import zlib
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxsft import tree
from jaxsft.lora import spec as of
from jaxsft.lora.spec import LoRA, matrix
from jaxsft.tree import Tree
from jaxsft.types import Key

Factors = tuple[Float[Array, "I r"], Float[Array, "r O"]]


@functools.partial(jax.jit, static_argnums=1)
def pissa(kernel: Float[Array, "I O"], rank: int, scale: Float[Array, ""] | float) -> Factors:
    """A = U sqrt(S / scale), B = sqrt(S / scale) V^T of the largest singular values: scale A B is W's best of rank r.

    Source: Meng et al. 2024, arXiv:2404.02948, eq. 2 and 3.

    Example:
      >>> a, b = pissa(jnp.diag(jnp.array([4.0, 2.0])), 1, 1.0)
      >>> (a @ b).round().tolist()
      [[4.0, 0.0], [0.0, 0.0]]
    """
    u, values, vt = jnp.linalg.svd(kernel.astype(jnp.float32), full_matrices=False)
    root = jnp.sqrt(values[:rank] / scale)
    return u[:, :rank] * root, root[:, None] * vt[:rank]


@functools.partial(jax.jit, static_argnums=1)
def olora(kernel: Float[Array, "I O"], rank: int, scale: Float[Array, ""] | float) -> Factors:
    """The first r columns of Q as B, the first r rows of R as A, of W^T = Q R; the scale does not enter.

    Source: Büyükakyüz 2024, arXiv:2406.01775.
    """
    q, r = jnp.linalg.qr(kernel.astype(jnp.float32).T)
    return r[:rank].T, q[:, :rank].T


STARTS: dict[str, Callable[..., Factors]] = {"pissa": pissa, "olora": olora}


def subtracts(spec: LoRA, layer: str) -> bool:
    """Whether what A and B start at is subtracted; the embedding starts as in PEFT, whatever the others do."""
    return spec.init in STARTS and layer != "embed"


def init(key: Key, params: Mapping, spec: LoRA) -> Tree:
    """Makes a fresh adapter for the layers that `spec.targets` chooses.

    Args:
      key: of jax.random.key.
      params: the base's parameters; shapes of them will do unless `spec` asks for DoRA, PiSSA or OLoRA.
      spec: rank, alpha, targets.

    Returns:
      the tree for `variables["lora"]`, float32.

    Raises:
      ValueError: a rank below 1 or above what a kernel has; targets that match nothing.

    Example:
      >>> params = {"q": {"kernel": jnp.ones((4, 3))}}
      >>> adapter = init(jax.random.key(0), params, LoRA(rank=2, targets="q", dora=True))
      >>> {path: leaf.shape for path, leaf in tree.flat(adapter).items()}
      {'q/a': (4, 2), 'q/b': (2, 3), 'q/m': (3,), 'q/scale': ()}
    """
    if spec.init not in ("lora", *STARTS):
        raise ValueError(f"tuning.lora.init {spec.init!r} is not known; known are lora, {', '.join(STARTS)}")
    leaves = {}
    for layer in of.targets(params, spec):
        kernel, r = matrix(params, layer), of.rank(spec, layer)
        *stack, n_in, n_out = kernel.shape
        if r < 1:
            raise ValueError(f"tuning.lora.rank is {r}; it must be at least 1")
        if subtracts(spec, layer):
            for half, start in zip("ab", _start(kernel, layer, r, spec), strict=True):
                # A copy: a step gives the memory of what trains away.
                leaves[f"{layer}/{half}"], leaves[f"{layer}/{half}0"] = jnp.copy(start), start
        else:
            own = jax.random.fold_in(key, zlib.crc32(layer.encode()))
            a, b, bound = (*stack, n_in, r), (*stack, r, n_out), 1 / math.sqrt(n_in)
            if layer == "embed":  # rows are looked up, so here A is the half that starts at zero
                leaves["embed/a"], leaves["embed/b"] = jnp.zeros(a), jax.random.normal(own, b)
            else:
                leaves[f"{layer}/a"] = jax.random.uniform(own, a, jnp.float32, -bound, bound)
                leaves[f"{layer}/b"] = jnp.zeros(b, jnp.float32)
        if spec.dora:
            leaves[f"{layer}/m"] = jnp.linalg.norm(_values(kernel, layer).astype(jnp.float32), axis=-2)
    return complete(tree.nest(leaves), params, spec)


def complete(adapter: Mapping, params: Mapping, spec: LoRA) -> Tree:
    """Adds to what trains of an adapter the constants: scale, and for PiSSA and OLoRA what they started at.

    The latter is found from the weights again, so up to rounding; where singular values are all but equal (random
    weights), another machine may find another part of the kernel by 1e-5.

    Args:
      adapter: A, B and for DoRA m, as they train.
      params: the base's parameters; shapes of them will do for a plain LoRA.
      spec: the adapter's.

    Example:
      >>> list(complete({"q": {"a": jnp.ones((4, 2)), "b": jnp.ones((2, 3))}}, {}, LoRA())["q"])
      ['a', 'b', 'scale']
    """
    leaves = tree.flat(adapter)
    for path in [p for p in leaves if p.endswith("/a")]:
        layer = path.removesuffix("/a")
        leaves[f"{layer}/scale"] = jnp.full(leaves[path].shape[:-2], of.scale(spec, layer), jnp.float32)
        if subtracts(spec, layer) and f"{layer}/a0" not in leaves:
            start = _start(matrix(params, layer), layer, leaves[path].shape[-1], spec)
            leaves[f"{layer}/a0"], leaves[f"{layer}/b0"] = start
    return tree.nest(leaves)


def _start(kernel: Array, layer: str, rank: int, spec: LoRA) -> Factors:
    """A and B of a stack of kernels, one after the other: a decomposition needs room."""
    *stack, n_in, n_out = kernel.shape
    if rank > min(n_in, n_out):
        raise ValueError(
            f"tuning.lora.rank {rank} is more than {layer} of {n_in} x {n_out} has; {spec.init} needs less"
        )
    a, b = _each(_values(kernel, layer).reshape(-1, n_in, n_out), spec.init, rank, of.scale(spec, layer))
    return a.reshape(*stack, n_in, rank), b.reshape(*stack, rank, n_out)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _each(kernels: Float[Array, "L I O"], start: str, rank: int, scale: float):
    return jax.lax.map(lambda kernel: STARTS[start](kernel, rank, scale), kernels)


def _values(kernel: Array, layer: str) -> Array:
    if isinstance(kernel, jax.ShapeDtypeStruct):
        raise ValueError(f"DoRA, PiSSA and OLoRA start from the weights of {layer}; give the parameters, not shapes")
    return jnp.asarray(kernel)
