"""What experts say of tokens: sorted by expert, multiplied in one piece each, and shared out over a mesh.

Tokens are sorted by expert, so that each expert meets its own in one piece, and `jax.lax.ragged_dot` multiplies all
pieces with their kernels. No token is dropped and none is padded.

Kernels have an expert axis in front, [E, in, out]. On a mesh the axis "expert" shares out experts and rows: a device
gathers the tokens of its group, computes what its own experts say of all of them, and the answers are summed and go
back to whose the tokens are. The axis "tensor" shares out the hidden units of each expert.
"""

import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from jaxsft import axes, quant, tree
from jaxsft.models import adapter
from jaxsft.models.remat import dear
from jaxsft.types import Key

Act = Callable[[Mapping[str, Array]], Array]  # {name: result of a product of the token} -> what "down" reads
Part = Callable[[Array], Array]  # of an unpacked kernel the hidden units that are here


def _packed(x: Array, packed: Mapping[str, Array], sizes: Array, part: Part | None) -> Array:
    @jax.checkpoint  # what the backward pass keeps is the codes
    def times(x: Array, packed: Mapping[str, Array]) -> Array:
        kernel = quant.unpack(packed, x.dtype)
        return jax.lax.ragged_dot(x, kernel if part is None else part(kernel), sizes)

    return times(x, packed)


def _product(
    x: Float[Array, "M I"],
    bank: Mapping[str, Any],
    sizes: Int[Array, "E"],
    drop: adapter.Drop | None = None,
    part: Part | None = None,
) -> Float[Array, "M O"]:
    """x W_e + bias_e + scale_e (x A_e) B_e for the rows of each expert e, which lie in order and number sizes[e].

    Rows behind the last expert's are 0, and so are their gradients.
    """
    if "m" in bank:
        raise ValueError("DoRA is not supported for experts; leave them out of tuning.lora.targets")
    leaf, ours = lambda name: bank[name].astype(x.dtype), (jnp.arange(x.shape[0]) < sizes.sum())[:, None]
    x = jnp.where(ours, x, 0)  # what ragged_dot leaves behind its groups is not said
    y = _packed(x, bank["packed"], sizes, part) if "packed" in bank else jax.lax.ragged_dot(x, leaf("kernel"), sizes)
    if "bias" in bank:
        y = y + jnp.repeat(leaf("bias"), sizes, axis=0, total_repeat_length=x.shape[0])
    if "a" in bank:
        through = lambda x, a, b: jax.lax.ragged_dot(jax.lax.ragged_dot(x, leaf(a) * scale, sizes), leaf(b), sizes)
        scale = leaf("scale")[:, None, None]
        y = y + through(x if drop is None else drop(x), "a", "b")
        y = y - through(x, "a0", "b0") if "a0" in bank else y
    return dear(jnp.where(ours, y, 0))


def _count(banks: Any) -> int:
    return jax.tree.leaves(banks)[0].shape[0]  # every leaf has the experts in front


def mixture(
    x: Float[Array, "N D"],
    chosen: Int[Array, "N K"],
    weights: Float[Array, "N K"],
    banks: Mapping[str, Mapping[str, Any]],
    act: Act,
    first: Int[Array, ""] | int = 0,
    drop: Callable[[str], adapter.Drop | None] = lambda name: None,
    part: Callable[[str], Part | None] = lambda name: None,
) -> Float[Array, "N D"]:
    """sum_k weights[k] expert_chosen[k](x), over the experts that `banks` has: `first` and those after it.

    Args:
      x: tokens.
      chosen: the experts of each.
      weights: of each one's answer.
      banks: the leaves of `Bank` by the product's name; all but "down" read the token.
      act: {name: result of a product of the token} -> what "down" reads.
      first: the number of the first expert here; the answers of experts elsewhere count as 0.
      drop: a product's name -> dropout on the input of its adapter.
      part: a product's name -> what of its packed kernel is used here; all by default.
    """
    N, K = chosen.shape
    E = _count(banks)
    here = chosen.reshape(-1) - first
    here = jnp.where((here >= 0) & (here < E), here, E)  # what is elsewhere sorts behind
    order = jnp.argsort(here, stable=True)
    sizes = jnp.bincount(here, length=E).astype(jnp.int32)  # leaves the E-th out
    rows = x[order // K]
    product = lambda x, name: _product(x, banks[name], sizes, drop(name), part(name))
    y = product(act({name: product(rows, name) for name in banks if name != "down"}), "down")
    y = y.astype(jnp.float32) * weights.reshape(-1)[order][:, None].astype(jnp.float32)
    back = jnp.argsort(order)
    return y[back].reshape(N, K, -1).sum(axis=1).astype(x.dtype)


def spread(
    mesh: Mesh | None,
    x: Float[Array, "B T D"],
    chosen: Int[Array, "B T K"],
    weights: Float[Array, "B T K"],
    banks: Mapping[str, Mapping[str, Any]],
    act: Act,
    dropout: tuple[float, Key | None] = (0.0, None),
) -> Float[Array, "B T D"]:
    """`mixture` with tokens, experts and hidden units shared out over a mesh, as far as the numbers divide."""
    B, T, _ = x.shape
    rate, key = dropout
    flat = lambda part: part.reshape(-1, part.shape[-1])

    def drops(*keys: Key | None) -> Callable[[str], adapter.Drop | None]:
        """Dropout of products that read a token, whose key is the first, and of "down", whose key is the last."""
        own = lambda name: keys[-1 if name == "down" else 0]
        named = lambda name, key: None if key is None else jax.random.fold_in(key, zlib.crc32(name.encode()))
        return lambda name: adapter.dropout(rate, named(name, own(name)))

    if mesh is None or mesh.size == 1 or B % axes.rows(mesh):
        return mixture(flat(x), flat(chosen), flat(weights), banks, act, drop=drops(key)).reshape(x.shape)
    divides = lambda axis, n: axis if n % mesh.shape[axis] == 0 else None
    context = divides(axes.CONTEXT, T)
    expert, tensor = divides(axes.EXPERT, _count(banks)), divides(axes.TENSOR, _units(banks["down"]))
    if tensor and "bias" in banks["down"]:  # what the devices along `tensor` say of a token is summed
        banks = {**banks, "down": {**banks["down"], "bias": banks["down"]["bias"] / mesh.shape[tensor]}}

    def part(name: str) -> Part | None:
        """Blocks of a packed kernel may go across the cut, so it is whole until it is unpacked."""

        def cut(kernel: Array) -> Array:
            axis = 1 if name == "down" else 2
            size = kernel.shape[axis] // mesh.shape[axes.TENSOR]
            return jax.lax.dynamic_slice_in_dim(kernel, jax.lax.axis_index(tensor) * size, size, axis)

        return cut if tensor else None

    def own(x, chosen, weights, banks, key):
        shape, first = x.shape, 0
        x, chosen, weights = map(flat, (x, chosen, weights))
        if expert:
            first = jax.lax.axis_index(expert) * _count(banks)
            gather = lambda part: jax.lax.all_gather(part, expert, tiled=True)
            x, chosen, weights = map(gather, (x, chosen, weights))
        keys = (key,)
        if key is not None:
            key = jax.random.fold_in(key, jax.lax.axis_index((*axes.ROWS, context) if context else axes.ROWS))
            keys = (key, jax.random.fold_in(key, jax.lax.axis_index(tensor))) if tensor else (key,)
        if tensor:
            # Each device's hidden units pull on the same tokens: said here, or the gradients of those are not summed.
            x, weights = (jax.lax.pcast(part, tensor, to="varying") for part in (x, weights))
        y = mixture(x, chosen, weights, banks, act, first, drops(*keys), part)
        y = jax.lax.psum_scatter(y, expert, tiled=True) if expert else y
        return (jax.lax.psum(y, tensor) if tensor else y).reshape(shape)

    rows = PartitionSpec(axes.ROWS, context, None)
    specs = tree.nest({path: _spec(path, leaf.ndim, expert, tensor) for path, leaf in tree.flat(banks).items()})
    shared = jax.shard_map(own, mesh=mesh, in_specs=(rows, rows, rows, specs, PartitionSpec()), out_specs=rows)
    return shared(x, chosen, weights, banks, key)


def _units(down: Mapping[str, Any]) -> int:
    """The hidden units of an expert, which "down" reads."""
    kernel = quant.kernels({"down": down["packed"]})["down"]["kernel"] if "packed" in down else down["kernel"]
    return kernel.shape[1]


def _spec(path: str, ndim: int, expert: str | None, tensor: str | None) -> PartitionSpec:
    """How a leaf of the banks is cut: by experts, and where it has an axis of hidden units, by those."""
    product, leaf = path.split("/", 1)
    if product == "down":
        units = 1 if leaf in ("kernel", "a", "a0") else None
    else:
        units = ndim - 1 if leaf in ("kernel", "bias", "b", "b0") else None
    return PartitionSpec(expert, *(tensor if axis == units else None for axis in range(1, ndim)))
