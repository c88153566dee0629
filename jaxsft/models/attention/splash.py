"""Splash attention, JAX's Pallas kernel for TPUs: blocks that no query sees, by causality or window, are never loaded.

https://github.com/jax-ml/jax/tree/main/jax/experimental/pallas/ops/tpu/splash_attention
"""

import math

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jaxtyping import Array, Float

from jaxsft.models.attention.where import NO_WINDOW, Where, pad
from jaxsft.models.remat import DEAR

LANES = 128  # a TPU's; the kernel's blocks are multiples of it
LARGEST = 512  # tokens of a block


def splash(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    where: Where,
    window: int = NO_WINDOW,
    *,
    sinks: Float[Array, "N"] | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
) -> Float[Array, "B T N H"]:
    """What `plain` gives for training rows; arguments as for `attend`, but `where` without `reads`.

    Queries are scaled before the kernel sees them, so in bfloat16 they are rounded once more where the scale is not a
    power of two. Away from a TPU Pallas interprets the kernel, which is for tests.

    Source: Dao et al. 2022, arXiv:2205.14135, over the blocks of a sparse mask.
    """
    T, N, H = q.shape[1], q.shape[2], q.shape[-1]
    block = min(LARGEST, -(-T // LANES) * LANES)
    q, k, v, where = pad(block, q, k, v, where)
    length = q.shape[1]
    square = (length, length)
    mask = masks.CausalMask(square) if window >= length else masks.LocalMask(square, (window - 1, 0), offset=0)
    sizes = kernel.BlockSizes(block, block, block, block, block, block, block, block)
    attention = kernel.make_splash_mha(
        masks.MultiHeadMask([mask] * N),
        block_sizes=sizes,
        attn_logits_soft_cap=soft_cap,
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=DEAR,
        interpret=jax.default_backend() != "tpu",
    )
    scaled = (q.astype(jnp.float32) * (1 / math.sqrt(H) if scale is None else scale)).astype(q.dtype)
    row = lambda q, k, v, segments: attention(q, k, v, kernel.SegmentIds(segments, segments), sinks)
    heads = lambda x: x.swapaxes(1, 2)
    out = jax.vmap(row)(heads(scaled), heads(k), heads(v), where.segments)
    return out.swapaxes(1, 2)[:, :T]
