"""Attention alone, values and gradients: every kernel that runs here, beside torch, in turns.

    pip install -e ".[parity]" && python benchmarks/attention.py
    python benchmarks/attention.py --rows 8 --length 4096 --heads 32 --kv_heads 8 --head_dim 128 --dtype bfloat16 \
        --documents 10 --json attention.json

Rows hold `--documents` documents of equal length. torch has a mask of [T, T] for more than one, as transformers makes
of packed rows; with one it is told that attention is causal. Where flash_attn is installed its kernel for packed rows
runs as well, and on Hopper or later cuDNN's, which JAX has in a private module. The table says by how much each differs
from all scores at once. What is best goes into `BEST` of jaxsft/models/attention/choice.py.
"""

import argparse
import functools
import importlib.util
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import harness
import jax
import jax.numpy as jnp
import numpy as np

from jaxsft.models.attention import Where, attend, plain
from jaxsft.models.attention.choice import KERNELS


def rows(args: argparse.Namespace) -> Where:
    ends = np.linspace(0, args.length, args.documents + 1).astype(np.int32)
    lengths = np.diff(ends)
    segments = np.repeat(np.arange(1, args.documents + 1), lengths)
    positions = np.concatenate([np.arange(n) for n in lengths])
    wide = lambda x: jnp.asarray(np.tile(x, (args.rows, 1)), jnp.int32)
    return Where(wide(positions), wide(segments))


def pulled(attention: Callable, q, k, v, weights) -> Callable:
    """A compiled run of attention and its gradients, that waits for what it gives."""

    @jax.jit
    def run(q, k, v, weights):
        out, back = jax.vjp(attention, q, k, v)
        return out, *back(weights)

    return lambda: jax.block_until_ready(run(q, k, v, weights))


def cudnn(where: Where, documents: int, q, k, v):
    """cuDNN's packed rows: a document a segment, where each begins, and how long it is."""
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

    counts = jax.vmap(lambda row: jnp.bincount(row, length=documents + 1)[1:])(where.segments).astype(jnp.int32)
    starts = jnp.pad(jnp.cumsum(counts, axis=1), [(0, 0), (1, 0)]).astype(jnp.int32)
    scale = q.shape[-1] ** -0.5
    return dot_product_attention(
        q,
        k,
        v,
        q_seqlen=counts,
        kv_seqlen=counts,
        q_offsets=starts,
        kv_offsets=starts,
        scale=scale,
        mask_type=MaskType.PADDING_CAUSAL,
    )


def jax_sides(args: argparse.Namespace, where: Where, given: list) -> dict[str, Callable]:
    backend = jax.default_backend()
    here = [name for name, kernel in KERNELS.items() if backend in kernel.backends and name != "plain"]
    sides: dict[str, Callable] = {name: functools.partial(attend, where=where, kernel=name) for name in here}
    if backend == "gpu" and args.dtype == "bfloat16":
        sides["cudnn"] = functools.partial(cudnn, where, args.documents)
    return {name: pulled(side, *given) for name, side in sides.items()}


def torch_sides(args: argparse.Namespace, where: Where, given: list) -> dict[str, Callable]:
    if importlib.util.find_spec("torch") is None:
        return {}
    import torch

    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    tensors = [torch.tensor(np.asarray(x, np.float32), device=device, dtype=getattr(torch, args.dtype)) for x in given]
    segments = torch.tensor(np.asarray(where.segments[0]), device=device)
    mask = (segments[:, None] == segments).tril() if args.documents > 1 else None

    def back(attention: Callable, q, k, v, weights):
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
        out = attention(q, k, v)
        out.backward(weights)
        if device == "cuda":
            torch.cuda.synchronize()
        return out.detach(), q.grad, k.grad, v.grad

    by_heads = [x.transpose(1, 2).contiguous() for x in tensors]
    sdpa = functools.partial(
        torch.nn.functional.scaled_dot_product_attention, attn_mask=mask, is_causal=mask is None, enable_gqa=True
    )
    sides = {"torch sdpa": lambda: [x.transpose(1, 2) for x in back(sdpa, *by_heads)]}
    if device == "cuda" and importlib.util.find_spec("flash_attn"):
        from flash_attn import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]

        lengths = np.tile(np.bincount(np.asarray(where.segments[0]))[1:], args.rows)
        ends = torch.tensor(np.concatenate([[0], np.cumsum(lengths)]), dtype=torch.int32, device=device)
        longest = int(lengths.max())
        flash = lambda q, k, v: flash_attn_varlen_func(q, k, v, ends, ends, longest, longest, causal=True)
        flat = [x.flatten(0, 1) for x in tensors]
        sides["flash_attn"] = lambda: [x.unflatten(0, (args.rows, -1)) for x in back(flash, *flat)]
    return sides


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--documents", type=int, default=1, help="a row")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv_heads", type=int, default=4)
    parser.add_argument("--head_dim", type=int, default=64)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the rows")
    args = parser.parse_args()
    where, draw = rows(args), np.random.default_rng(0)
    make = lambda n: jnp.asarray(draw.normal(size=(args.rows, args.length, n, args.head_dim)), args.dtype)
    given = [make(n) for n in (args.heads, args.kv_heads, args.kv_heads, args.heads)]
    at_once = pulled(lambda q, k, v: plain(q, k, v, where, where), *given)
    sides = {"plain": at_once} | jax_sides(args, where, given) | torch_sides(args, where, given)
    array = lambda x: np.asarray(x.float().cpu() if hasattr(x, "cpu") else x, np.float32)
    expected, found = [array(x) for x in at_once()], {}
    for name, side in list(sides.items()):
        try:
            parts = zip(side(), expected, strict=True)
            found[name] = {"apart": float(max(np.abs(array(x) - y).max() for x, y in parts)), "times": []}
        except Exception as error:  # a kernel says here what shape or card it does not take; the others go on
            print(f"{name}: {type(error).__name__}: {str(error).splitlines()[0]}")
            del sides[name]
    for _ in range(args.turns):
        for name, side in sides.items():
            start = time.perf_counter()
            side()
            found[name]["times"].append(time.perf_counter() - start)
    on = f"{jax.devices()[0].device_kind or platform.machine()}, jax {jax.__version__}"
    case = f"{args.rows} x {args.length} x {args.heads}/{args.kv_heads} x {args.head_dim}, {args.dtype}"
    case += f", {args.documents} a row" if args.documents > 1 else ""
    table = []
    for name, side in found.items():
        times = side["times"]
        figures = {"value": statistics.median(times), "low": min(times), "high": max(times), "unit": "s"}
        table.append({"case": case, "side": name, **figures, "apart": side["apart"], "on": on})
        print(f"{name:12} {side['apart']:9.1e} from all scores at once")
    harness.show(table, args.json)


if __name__ == "__main__":
    main()
