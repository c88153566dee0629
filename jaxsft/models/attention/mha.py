"""Flash attention of JAX's Pallas kernels for NVIDIA GPUs (Triton): causal, within segments, without windows.

https://github.com/jax-ml/jax/blob/main/jax/experimental/pallas/ops/gpu/attention.py
"""

import math
from typing import cast

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.gpu import attention as kernel
from jaxtyping import Array, Float

from jaxsft.models.attention.where import Where, pad

BLOCK = 128  # tokens; the largest of the kernel's own default blocks, which all divide it


def mha(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    where: Where,
    *,
    scale: float | None = None,
) -> Float[Array, "B T N H"]:
    """What `plain` gives for training rows; arguments as for `attend`, but `where` without `reads`.

    The kernel has as many key heads as query heads, so those of a group are copied, and it goes through all keys
    before a query, whatever their segments. Away from a GPU Pallas interprets it, which is for tests.

    Source: Dao 2023, arXiv:2307.08691.
    """
    T, N, H = q.shape[1], q.shape[2], q.shape[-1]
    q, k, v, where = pad(BLOCK, q, k, v, where)
    k, v = (jnp.repeat(x, N // x.shape[2], axis=2) for x in (k, v))
    scale = 1 / math.sqrt(H) if scale is None else scale
    interpret = jax.default_backend() != "gpu"
    out = kernel.mha(q, k, v, where.segments, sm_scale=scale, causal=True, interpret=interpret)
    return cast(Array, out)[:, :T]
