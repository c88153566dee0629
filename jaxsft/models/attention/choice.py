"""Which kernel computes attention: one table, a choice when a model is built, and one function that goes by it."""

import functools
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from jaxsft import axes
from jaxsft.models.attention.blocks import blocks
from jaxsft.models.attention.plain import plain
from jaxsft.models.attention.where import NO_WINDOW, Where
from jaxsft.models.remat import dear

# What a model or a batch may need beyond causal attention inside the documents of a row.
BOTH_SIDES, WINDOWS, SOFT_CAPS, SINKS = "attention to both sides", "windows", "soft caps", "sinks"
PAIRS, CONTEXT = "pairs that share a prompt", "rows cut over mesh.context"


@dataclass(frozen=True)
class Kernel:
    """Where a kernel runs, and what it cannot do."""

    backends: tuple[str, ...] = ("cpu", "gpu", "tpu")
    lacks: frozenset[str] = frozenset()


KERNELS = {
    "blocks": Kernel(),
    "plain": Kernel(lacks=frozenset({CONTEXT})),
    "splash": Kernel(("tpu",), frozenset({BOTH_SIDES, PAIRS, CONTEXT})),
    "mha": Kernel(("gpu",), frozenset({BOTH_SIDES, WINDOWS, SOFT_CAPS, SINKS, PAIRS, CONTEXT})),
}
# What "auto" takes: the first that can do what the model needs. Who has measured otherwise changes a line here.
BEST = {"cpu": ("blocks",), "gpu": ("mha", "blocks"), "tpu": ("splash", "blocks")}


def pieces(mesh: Mesh | None) -> int:
    """Into how many pieces each row is cut."""
    return 1 if mesh is None else mesh.shape[axes.CONTEXT]


def choose(wanted: str, needs: Collection[str], mesh: Mesh | None = None, backend: str | None = None) -> str:
    """The kernel that a model goes by.

    Args:
      wanted: its name, or "auto" for the backend's best.
      needs: of those above.
      mesh: over which rows may be cut.
      backend: "cpu", "gpu" or "tpu"; by default the one that JAX runs on.

    Raises:
      ValueError: an unknown kernel, one that does not run here, or cannot do what is needed.

    Example:
      >>> choose("auto", {WINDOWS}, backend="tpu"), choose("auto", {WINDOWS}, backend="gpu")
      ('splash', 'blocks')
      >>> choose("mha", {WINDOWS}, backend="gpu")
      Traceback (most recent call last):
      ...
      ValueError: attention mha has no windows, which this model needs; take auto, or one of blocks, plain
    """
    backend = backend or jax.default_backend()
    needs = {*needs, CONTEXT} if pieces(mesh) > 1 else {*needs}
    able = lambda name: KERNELS[name].lacks.isdisjoint(needs)
    if wanted == "auto":
        return next(filter(able, BEST.get(backend, ("blocks",))))
    if wanted not in KERNELS:
        raise ValueError(f"attention {wanted!r} is not known; known are auto, {', '.join(KERNELS)}")
    others = ", ".join(name for name, kernel in KERNELS.items() if backend in kernel.backends and able(name))
    if backend not in KERNELS[wanted].backends:
        runs = " or ".join(KERNELS[wanted].backends)
        raise ValueError(f"attention {wanted} runs on a {runs}, and this is a {backend}; take auto, or one of {others}")
    if missing := sorted(KERNELS[wanted].lacks.intersection(needs)):
        raise ValueError(
            f"attention {wanted} has no {missing[0]}, which this model needs; take auto, or one of {others}"
        )
    return wanted


def describe(kernel: str, mesh: Mesh | None = None) -> str:
    """The choice, for people.

    Example:
      >>> describe("splash").endswith("; blocks for pairs that share a prompt")
      True
    """
    said = f"{kernel} ({jax.default_backend()})"
    if pieces(mesh) > 1:
        said += f", keys in a ring of {pieces(mesh)}"
    return said + (f"; blocks for {PAIRS}" if PAIRS in KERNELS[kernel].lacks else "")


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    where: Where,
    window: Int[Array, ""] | int = NO_WINDOW,
    *,
    sinks: Float[Array, "N"] | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    causal: bool = True,
    kernel: str = "blocks",
    windows: Sequence[int] = (NO_WINDOW,),
    mesh: Mesh | None = None,
) -> Float[Array, "B T N H"]:
    """Softmax(q k / sqrt(H)) v over the visible keys; N query heads share K key heads in groups of N / K.

    Tokens stand as in training rows, where no causal query needs a key further right (a segment that is read lies left
    of who reads it). What is found for padding is not specified.

    Args:
      q, k, v: heads, q and k rotated; softmax in float32 whatever their dtype.
      where: where the tokens stand.
      window: how many positions back a token sees, itself included.
      sinks: of each head, a score beside those of the keys that takes weight and gives nothing (Xiao et al. 2023,
        arXiv:2309.17453, section 3.3; gpt-oss).
      scale: of the scores, in 1 / sqrt(H)'s place.
      soft_cap: bounds the scores, cap tanh(score / cap) (Gemma 2, arXiv:2408.00118, section 2).
      causal: a token sees nothing behind it; otherwise its whole document, as in an encoder.
      kernel: from `choose`.
      windows: all that `window` may be, for a kernel whose mask is fixed when it is compiled.
      mesh: over which rows, their pieces and heads are cut; each device then computes its own, and over the axis
        `context` the keys of a row go round its devices (Liu et al. 2023, arXiv:2310.01889).

    Source: Vaswani et al. 2017, arXiv:1706.03762, eq. 1; groups: Ainslie et al. 2023, arXiv:2305.13245.
    """
    if where.reads is not None and PAIRS in KERNELS[kernel].lacks:
        kernel = "blocks"
    how: dict[str, Any] = {"scale": scale, "soft_cap": soft_cap}

    def run(q, k, v, sinks, where, window, ring=None):
        match kernel:
            case "plain":
                return dear(plain(q, k, v, where, where, window, **how, sinks=sinks, causal=causal))
            case "splash":
                from jaxsft.models.attention.splash import splash  # here, as only a TPU needs what it imports

                by = [functools.partial(splash, window=fixed, sinks=sinks, **how) for fixed in windows]
                return jax.lax.switch(jnp.argmax(jnp.array(windows) == window), by, q, k, v, where)
            case "mha":
                from jaxsft.models.attention.mha import mha  # likewise for a GPU

                return dear(mha(q, k, v, where, scale=scale))
        return blocks(q, k, v, where, window, **how, sinks=sinks, causal=causal, ring=ring)

    if mesh is None or mesh.size == 1:
        return run(q, k, v, sinks, where, window)
    cut = lambda axis, n: axis if n % mesh.shape[axis] == 0 else None
    rows = axes.ROWS if len(q) % axes.rows(mesh) == 0 else None
    piece, heads = cut(axes.CONTEXT, q.shape[1]), cut(axes.TENSOR, k.shape[2])
    ring = (axes.CONTEXT, mesh.shape[axes.CONTEXT]) if piece and pieces(mesh) > 1 else None
    own, token = PartitionSpec(rows, piece, heads, None), PartitionSpec(rows, piece)
    specs = (own, own, own, jax.tree.map(lambda _: PartitionSpec(heads), sinks), jax.tree.map(lambda _: token, where))
    each = functools.partial(run, ring=ring)
    # Kernels and loops do not say over which axes their results vary, so that is not checked.
    spread = jax.shard_map(each, mesh=mesh, in_specs=(*specs, PartitionSpec()), out_specs=own, check_vma=False)
    return spread(q, k, v, sinks, where, window)
