"""Rotary position embeddings: the frequencies each checkpoint was trained with, and the rotation.

Half-split layout, as Hugging Face checkpoints store it: feature i turns with feature i + head_dim / 2.
Source: Su et al. 2021, RoFormer, arXiv:2104.09864, eq. 15; Llama 3's scaling: `rope_type: llama3` of transformers.
"""

import math
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


@dataclass(frozen=True)
class Rope:
    """How positions become angles; `kind` is `default`, `linear` or `llama3`."""

    theta: float = 10_000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0  # llama3 only, like the next two
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


def frequencies(rope: Rope, head_dim: int) -> Float[np.ndarray, "half"]:
    """Returns the head_dim / 2 angular frequencies, in radians a position.

    Raises:
      ValueError: an unknown kind.

    Example:
      >>> frequencies(Rope(theta=100.0), 4)
      array([1. , 0.1], dtype=float32)
    """
    inverse = 1.0 / rope.theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    match rope.kind:
        case "default":
            pass
        case "linear":
            inverse = inverse / rope.factor
        case "llama3":  # slow waves are stretched, fast ones kept, those between are blended
            wavelength = 2 * math.pi / inverse
            turns = rope.original_max_position / wavelength
            smooth = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
            smooth = np.clip(smooth, 0.0, 1.0)
            inverse = (1 - smooth) * inverse / rope.factor + smooth * inverse
        case _:
            raise ValueError(f"rope type {rope.kind!r} is not known; known are default, linear, llama3")
    return inverse.astype(np.float32)


def angles(
    positions: Int[Array, "B T"], inverse: Float[np.ndarray, "half"]
) -> tuple[Float[Array, "B T 1 half"], Float[Array, "B T 1 half"]]:
    """Returns cosine and sine of every position's angles, in float32: bfloat16 cannot hold a position above 256."""
    radians = positions[..., None, None].astype(jnp.float32) * inverse
    return jnp.cos(radians), jnp.sin(radians)


def rotate(
    x: Float[Array, "B T N H"], cos: Float[Array, "B T 1 half"], sin: Float[Array, "B T 1 half"]
) -> Float[Array, "B T N H"]:
    """Turns each head's feature pairs by the angles; computed in float32, returned in the dtype of `x`."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
