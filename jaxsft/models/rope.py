"""Rotary position embeddings: the frequencies each checkpoint was trained with, and the rotation.

Half-split layout, as Hugging Face checkpoints store it: feature i turns with feature i + head_dim / 2.
Source: Su et al. 2021, RoFormer, arXiv:2104.09864, eq. 15; Llama 3's scaling: `rope_type: llama3` of transformers.
"""

import math
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

KINDS = ("default", "linear", "llama3", "yarn", "dynamic", "longrope", "none")  # none: q and k are not turned at all
BY_LENGTH = ("dynamic", "longrope")  # a document is turned by frequencies that its length decides


@dataclass(frozen=True)
class Rope:
    """How positions become angles; `kind` is one of `KINDS`."""

    theta: float = 10_000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0  # llama3 only, like the next one
    high_freq_factor: float = 4.0
    original_max_position: int = 8192  # llama3, yarn, dynamic, longrope
    beta_fast: float = 32.0  # yarn only, like the next three: turns above which a wave is kept
    beta_slow: float = 1.0  # turns below which a wave is stretched
    truncate: bool = True  # the blend begins and ends at whole features
    attention_factor: float | None = None  # yarn and longrope: of cosine and sine; see `amplitude` for its default
    short_factor: tuple[float, ...] = ()  # longrope only: divide the frequencies of documents up to the original length
    long_factor: tuple[float, ...] = ()  # and of longer ones
    partial: float = 1.0  # the share of a head's features that turn, the first ones


def frequencies(rope: Rope, head_dim: int) -> Float[np.ndarray, "half"]:
    """Returns the head_dim / 2 angular frequencies, in radians a position (fewer where `rope.partial` is below 1).

    Those of `BY_LENGTH` are what documents of at most the original length have; `stretched` has the rest.

    Raises:
      ValueError: an unknown kind.

    Example:
      >>> frequencies(Rope(theta=100.0), 4)
      array([1. , 0.1], dtype=float32)
    """
    head_dim = int(head_dim * rope.partial)
    inverse = 1.0 / rope.theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    match rope.kind:
        case "default" | "dynamic":
            pass
        case "longrope":
            inverse = inverse / np.array(rope.short_factor)
        case "linear":
            inverse = inverse / rope.factor
        case "llama3":  # slow waves are stretched, fast ones kept, those between are blended
            wavelength = 2 * math.pi / inverse
            turns = rope.original_max_position / wavelength
            smooth = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
            smooth = np.clip(smooth, 0.0, 1.0)
            inverse = (1 - smooth) * inverse / rope.factor + smooth * inverse
        case "yarn":  # the same by feature instead of by wavelength (Peng et al. 2023, arXiv:2309.00071, section 3.2)
            low, high = (_feature(turns, rope, head_dim) for turns in (rope.beta_fast, rope.beta_slow))
            low, high = (math.floor(low), math.ceil(high)) if rope.truncate else (low, high)
            low, high = max(low, 0), min(high, head_dim - 1)
            blend = (np.arange(head_dim // 2) - low) / (high - low if high != low else 0.001)
            blend = np.clip(blend, 0.0, 1.0)
            inverse = blend * inverse / rope.factor + (1 - blend) * inverse
        case "none":
            inverse = 0 * inverse
        case _:
            raise ValueError(f"rope type {rope.kind!r} is not known; known are {', '.join(KINDS)}")
    return inverse.astype(np.float32)


def stretched(rope: Rope, head_dim: int, lengths: Int[Array, "B T"]) -> Float[Array, "B T half"]:
    """The frequencies of `BY_LENGTH`, for each token from the length of the document it stands in.

    dynamic: theta grows with the length beyond the original one, theta (factor length / original - factor + 1) ^
    (d / (d - 2)) ("NTK-aware" scaling, bloc97 2023; `rope_type: dynamic` of transformers). longrope: one set of factors
    up to the original length and one beyond (Ding et al. 2024, arXiv:2402.13753, section 3.2).

    Example:
      >>> rope = Rope(theta=100.0, kind="dynamic", factor=2.0, original_max_position=8)
      >>> [round(float(f), 3) for f in stretched(rope, 4, jnp.array([[8, 16]]))[0, :, 1]]
      [0.1, 0.033]
    """
    short = frequencies(rope, head_dim)
    if rope.kind == "longrope":
        long = short * (np.array(rope.short_factor) / np.array(rope.long_factor)).astype(np.float32)
        return jnp.where((lengths > rope.original_max_position)[..., None], long, short)
    d, most = 2 * len(short), rope.original_max_position
    growth = rope.factor * jnp.maximum(lengths, most) / most - (rope.factor - 1)
    powers = np.arange(0, d, 2, dtype=np.float32) / (d - 2)  # theta's power d / (d - 2), times a feature's 2 i / d
    return jnp.asarray(short) * growth[..., None].astype(jnp.float32) ** -powers


def _feature(turns: float, rope: Rope, head_dim: int) -> float:
    """The feature whose wave turns so often over the positions of the original training."""
    return head_dim * math.log(rope.original_max_position / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))


def amplitude(rope: Rope) -> float:
    """What cosine and sine are multiplied with: 1, but for yarn (Peng et al. 2023, eq. 22) and longrope.

    Example:
      >>> amplitude(Rope(kind="yarn", factor=1.0)), amplitude(Rope())
      (1.0, 1.0)
    """
    if rope.kind not in ("yarn", "longrope"):
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.factor <= 1:
        return 1.0
    if rope.kind == "longrope":
        return math.sqrt(1 + math.log(rope.factor) / math.log(rope.original_max_position))
    return 0.1 * math.log(rope.factor) + 1.0


def angles(
    positions: Int[Array, "B T"], inverse: Float[Array | np.ndarray, "*BT half"], amplitude: float = 1.0
) -> tuple[Float[Array, "B T 1 half"], Float[Array, "B T 1 half"]]:
    """Returns cosine and sine of every position's angles, in float32: bfloat16 cannot hold a position above 256."""
    radians = (positions[..., None].astype(jnp.float32) * inverse)[..., None, :]
    return jnp.cos(radians) * amplitude, jnp.sin(radians) * amplitude


def rotate(
    x: Float[Array, "B T N H"], cos: Float[Array, "B T 1 half"], sin: Float[Array, "B T 1 half"]
) -> Float[Array, "B T N H"]:
    """Turns each head's feature pairs by the angles; computed in float32, returned in the dtype of `x`.

    Features beyond the first 2 half stay as they are.
    """
    half = cos.shape[-1]
    turning, rest = x[..., : 2 * half], x[..., 2 * half :]
    first, second = jnp.split(turning.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
    return turned if not rest.shape[-1] else jnp.concatenate([turned, rest], axis=-1)
