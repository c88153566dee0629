"""Packed kernels: int8 and NF4 storage for a frozen base, dequantised inside the matrix product.

A packed kernel is a dict of arrays, in a tree of its own beside the parameters, at the kernel's address:

    params/blocks/0-7/attn/q/kernel         [8, in, out]     what it stands for, and what is then absent

    packed/blocks/0-7/attn/q/codes          [8, in, out]     int8: W = codes * scale
    packed/blocks/0-7/attn/q/scale          [8, out]

    packed/blocks/0-7/attn/q/codes          [8, in/2, out]   nf4: W = NF4[codes] * absmax of the block
    packed/blocks/0-7/attn/q/absmax         [8, in/64, out]
    packed/blocks/0-7/attn/q/absmax_scale   [8, in out / 64 / 256]
    packed/blocks/0-7/attn/q/absmax_mean    [8]

Any number of axes may stand before [in, out]; each kernel of a stack is packed on its own. int8 is symmetric, with a
scale for each output (Dettmers et al. 2022, arXiv:2208.07339, section 3.1). NF4 has 16 levels, quantiles of the normal
distribution, on blocks of 64 inputs of one output; the blocks' largest magnitudes are quantised in turn, less their
mean, to 8 bits in groups of 256 (Dettmers et al. 2023, arXiv:2305.14314, eqs. 4 to 6): 4.13 bits a weight. Codes,
blocks and groups are those of bitsandbytes, but that a block ends with its output where 64 does not divide the inputs,
and that no block's magnitude comes back below 0.

What is packed does not train: LoRA does, beside it, and `hub.merge` folds that into the base's own files.
"""

from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Integer, UInt8

from jaxsft import narrow, tree
from jaxsft.tree import Pattern, Tree

KINDS = ("int8", "nf4")
BLOCK = 64  # inputs that share an absmax
GROUP = 256  # absmaxes that share a scale
TINY = float(np.finfo(np.float32).tiny)  # a divisor for what is all zero

# Dettmers et al. 2023, appendix E.
NF4 = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    np.float32,
)


def _dynamic() -> Float[np.ndarray, "256"]:
    """The 8-bit levels of absmaxes: 2^i to each side in the decade that ends at 10^(i - 6), i from 0 to 6; 0 and 1.

    Fine near 0 and coarse far out, so that one outlier does not flatten its group. Source: Dettmers et al. 2022,
    arXiv:2110.02861, section 1.3, dynamic tree quantisation.
    """
    edges = [np.linspace(0.1, 1, 2**i + 1) * 10.0 ** (i - 6) for i in range(7)]
    side = np.concatenate([(edge[:-1] + edge[1:]) / 2 for edge in edges])
    return np.sort(np.concatenate([-side, [0, 1], side])).astype(np.float32)


DYNAMIC = _dynamic()


def pack(kernel: Float[Array, "... I O"], kind: str) -> dict[str, Array]:
    """Quantises a kernel, or each of a stack of them.

    Args:
      kernel: [..., in, out], of any sizes and any floating dtype.
      kind: "int8" or "nf4".

    Returns:
      the leaves that `unpack` takes.

    Raises:
      ValueError: an unknown kind.

    Example:
      >>> {name: (leaf.shape, str(leaf.dtype)) for name, leaf in pack(jnp.ones((128, 3)), "int8").items()}
      {'codes': ((128, 3), 'int8'), 'scale': ((3,), 'float32')}
      >>> {name: (leaf.shape, str(leaf.dtype)) for name, leaf in pack(jnp.ones((128, 3)), "nf4").items()}
      {'codes': ((64, 3), 'uint8'), 'absmax': ((2, 3), 'uint8'),
       'absmax_scale': ((1,), 'float32'), 'absmax_mean': ((), 'float32')}
    """
    if kind not in KINDS:
        raise ValueError(f"model.quantise {kind!r} is not known; known are none, {', '.join(KINDS)}")
    kernel = kernel.astype(jnp.float32)
    return _pack_int8(kernel) if kind == "int8" else _pack_nf4(kernel)


def _pack_int8(kernel: Float[Array, "... I O"]) -> dict[str, Array]:
    scale = jnp.maximum(jnp.abs(kernel).max(-2) / 127, TINY)
    return {"codes": jnp.round(kernel / scale[..., None, :]).astype(jnp.int8), "scale": scale}


def _pack_nf4(kernel: Float[Array, "... I O"]) -> dict[str, Array]:
    *stack, n_in, n_out = kernel.shape
    blocks = -(-n_in // BLOCK)
    full = jnp.pad(kernel, [(0, 0)] * len(stack) + [(0, blocks * BLOCK - n_in), (0, 0)])
    full = full.reshape(*stack, blocks, BLOCK, n_out)
    absmax = jnp.abs(full).max(-2)
    codes = _nearest(NF4, full * (1 / jnp.maximum(absmax, TINY))[..., None, :])
    codes = codes.reshape(*stack, blocks * BLOCK, n_out)[..., :n_in, :]
    if n_in % 2:  # inputs that do not pair off keep a byte each, and a dtype that says so
        codes = codes.astype(jnp.int8)
    else:
        codes = codes[..., ::2, :] << 4 | codes[..., 1::2, :]
    mean = absmax.mean((-2, -1))
    rest = jnp.swapaxes(absmax, -2, -1).reshape(*stack, -1) - mean[..., None]  # one output's blocks after another's
    groups = -(-blocks * n_out // GROUP)
    rest = jnp.pad(rest, [(0, 0)] * len(stack) + [(0, groups * GROUP - blocks * n_out)])
    rest = rest.reshape(*stack, groups, GROUP)
    scale = jnp.maximum(jnp.abs(rest).max(-1), TINY)
    again = _nearest(DYNAMIC, rest * (1 / scale)[..., None]).reshape(*stack, -1)[..., : blocks * n_out]
    again = jnp.swapaxes(again.reshape(*stack, n_out, blocks), -2, -1)
    return {"codes": codes, "absmax": again, "absmax_scale": scale, "absmax_mean": mean}


def _nearest(levels: Float[np.ndarray, "N"], x: Float[Array, "..."]) -> UInt8[Array, "..."]:
    """The index of the level nearest to each number: of how many midpoints between levels it lies above."""
    return (x[..., None] > (levels[:-1] + levels[1:]) / 2).sum(-1, dtype=jnp.uint8)


def unpack(packed: Mapping[str, Array], dtype: jax.typing.DTypeLike = jnp.float32) -> Float[Array, "... I O"]:
    """Dequantises: the inverse of `pack`, up to its rounding; in float32, then cast.

    Example:
      >>> kernel = jnp.array([[0.5, -2.0], [1.0, 0.5]])
      >>> unpack(pack(kernel, "int8")).round(2).tolist()
      [[0.5, -2.0], [1.0, 0.5]]
    """
    codes = packed["codes"]
    if "scale" in packed:
        return (codes.astype(jnp.float32) * packed["scale"][..., None, :]).astype(dtype)
    if codes.dtype == jnp.uint8:
        *stack, pairs, n_out = codes.shape
        codes = jnp.stack([codes >> 4, codes & 15], axis=-2).reshape(*stack, 2 * pairs, n_out)
    absmax = jnp.repeat(_absmax(packed), BLOCK, axis=-2)[..., : codes.shape[-2], :]
    return (_level(codes) * absmax).astype(dtype)


def _level(codes: Integer[Array, "..."]) -> Float[Array, "..."]:
    """NF4[codes], chosen bit by bit: as fast as a gather on a CPU, and a TPU gathers single numbers slowly."""
    levels = [jnp.float32(level) for level in NF4]
    for bit in range(4):
        odd = (codes >> bit) & 1 == 1
        levels = [jnp.where(odd, high, low) for low, high in zip(levels[::2], levels[1::2], strict=True)]
    return levels[0]


def _absmax(packed: Mapping[str, Array]) -> Float[Array, "... blocks O"]:
    codes, scale, mean = (packed[name] for name in ("absmax", "absmax_scale", "absmax_mean"))
    *stack, blocks, n_out = codes.shape
    scale = jnp.repeat(scale, GROUP, axis=-1)[..., : blocks * n_out].reshape(*stack, n_out, blocks)
    absmax = jnp.asarray(DYNAMIC)[codes] * jnp.swapaxes(scale, -2, -1) + mean[..., None, None]
    return jnp.maximum(
        absmax, 0
    )  # beside an outlier a small one can come out below 0, and would turn its block's signs


@jax.checkpoint  # what the backward pass keeps is the codes; it dequantises them again
def product(x: Float[Array, "... N I"], packed: Mapping[str, Array]) -> Float[Array, "... N O"]:
    """x W of a packed W, dequantised to the dtype of `x`. Nothing of W's size outlives the product.

    Example:
      >>> product(jnp.ones((1, 2)), pack(jnp.array([[1.0, 2.0], [1.0, 2.0]]), "int8"))
      Array([[2., 4.]], dtype=float32)
    """
    return narrow.product(x, unpack(packed, x.dtype))


def kernels(packed: Mapping) -> Tree:
    """The shapes of the kernels that a tree of packed ones stands for, at their addresses among the parameters.

    Example:
      >>> kernels({"q": pack(jnp.ones((64, 3)), "nf4")})
      {'q': {'kernel': ShapeDtypeStruct(shape=(64, 3), dtype=float32)}}
    """
    found = {}
    for path, codes in tree.flat(packed).items():
        if path.endswith("/codes"):
            *stack, n_in, n_out = codes.shape
            shape = (*stack, n_in * (2 if codes.dtype == jnp.uint8 else 1), n_out)
            found[f"{path.removesuffix('/codes')}/kernel"] = jax.ShapeDtypeStruct(shape, jnp.float32)
    return tree.nest(found)


def check(trainable: Pattern, kernels: Iterable[str]) -> None:
    """Refuses to train what is packed.

    Args:
      trainable: the addresses of what trains, `params/...`.
      kernels: the addresses, among the parameters, of what is packed.

    Raises:
      ValueError: the one matches one of the others.
    """
    for kernel in kernels:
        if tree.matches(trainable, f"params/{kernel}"):
            raise ValueError(
                f"{kernel} is to train, but model.quantise packs it; train a LoRA beside it (tuning.method lora), "
                "leave it out of tuning.trainable, or set model.quantise none"
            )


def rules(params: tuple[tuple[str, PartitionSpec], ...]) -> tuple[tuple[str, PartitionSpec], ...]:
    """Sharding rules of packed kernels from those of the kernels: what has inputs or outputs is cut as they are."""
    made = []
    for pattern, spec in params:
        if pattern.endswith("/kernel"):
            layer, (*stack, n_in, n_out) = pattern.removesuffix("/kernel"), spec
            made += [
                (f"{layer}/(codes|absmax)", PartitionSpec(*stack, n_in, n_out)),
                (f"{layer}/scale", PartitionSpec(*stack, n_out)),
                (f"{layer}/absmax_scale", PartitionSpec(*stack, None)),
                (f"{layer}/absmax_mean", PartitionSpec(*stack)),
            ]
    return tuple(made)
