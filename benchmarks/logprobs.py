"""Log-probabilities of targets, and their gradients: jaxsft beside plain JAX and torch, the same work in the same run.

    pip install -e ".[parity]" && python benchmarks/logprobs.py
    python benchmarks/logprobs.py --device gpu --json found.json

Forward, and the gradient to the features alone (a frozen output layer) or to the output layer as well. On a CPU 2,048
tokens x 512 in float32, with vocabularies of 32,000 and 151,936; on a GPU 16,384 x 2,048 x 248,320 in bfloat16. Every
token counts. The peers:

    optax             softmax_cross_entropy_with_integer_labels of all logits, under jit
    torch             cross_entropy of all logits in float32
    torch in chunks   the same of 256 tokens (GPU: 1,024) at a time under torch.utils.checkpoint, as torchtune's

The peak is what is needed beside the inputs, gradients included: of JAX what XLA plans, since making the inputs leaves
more behind than that; of torch how far the process grew over the calls, or on a GPU what its allocator gave out.
"""

import json
from collections.abc import Callable
from pathlib import Path

import harness

Size = tuple[int, int, int]  # tokens, width, vocabulary
SIZES: dict[str, list[Size]] = {
    "cpu": [(2048, 512, 32_000), (2048, 512, 151_936)],
    "gpu": [(16_384, 2048, 248_320)],
}
DTYPES = {"cpu": "float32", "gpu": "bfloat16"}
TABLES = ("frozen", "trained")
CHUNKS = {"cpu": 256, "gpu": 1024}  # tokens of "torch in chunks"


def resident() -> int:
    """The most bytes that this process has had in memory."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def in_jax(loss: Callable, size: Size, table: str, calls: int, device: str) -> dict:
    import jax
    import jax.numpy as jnp

    tokens, width, vocabulary = size
    keys, dtype = jax.random.split(jax.random.key(0), 3), jnp.dtype(DTYPES[device])
    features = jax.random.normal(keys[0], (1, tokens, width), dtype)
    weights = 0.02 * jax.random.normal(keys[1], (vocabulary, width), dtype)
    targets = jax.random.randint(keys[2], (1, tokens), 0, vocabulary)
    which = 0 if table == "frozen" else (0, 1)
    run = jax.jit(jax.value_and_grad(lambda f, w, y: loss(f, w, y).mean(), which))
    run = run.lower(features, weights, targets).compile()
    jax.block_until_ready((features, weights, targets))
    plan = run.memory_analysis()
    planned = plan.temp_size_in_bytes + plan.output_size_in_bytes
    times = harness.timed(lambda: jax.block_until_ready(run(features, weights, targets)), calls)
    value = float(run(features, weights, targets)[0])
    return times | {"peak": planned, "loss": value, "on": jax.devices()[0].device_kind}


def ours(*given) -> dict:
    import jax.numpy as jnp

    from jaxsft import losses

    return in_jax(lambda f, w, y: -losses.logprobs(f, w, y, jnp.ones(y.shape, bool)), *given)


def summed(*given) -> dict:
    """As one operation, which supervised fine-tuning takes; the mean is over one number then."""
    import jax.numpy as jnp

    from jaxsft import losses

    return in_jax(lambda f, w, y: -losses.total(f, w, y, jnp.ones(y.shape, bool)) / y.size, *given)


def optax_whole(*given) -> dict:
    import jax.numpy as jnp
    import optax

    def loss(f, w, y):
        logits = jnp.einsum("btd,vd->btv", f, w, preferred_element_type=jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y)

    return in_jax(loss, *given)


def in_torch(loss: Callable, size: Size, table: str, calls: int, device: str) -> dict:
    import torch

    tokens, width, vocabulary = size
    where = {"device": "cuda" if device == "gpu" else "cpu", "dtype": getattr(torch, DTYPES[device])}
    torch.manual_seed(0)
    features = torch.randn(tokens, width, **where).requires_grad_()
    weights = (0.02 * torch.randn(vocabulary, width, **where)).requires_grad_(table == "trained")
    targets = torch.randint(0, vocabulary, (tokens,), device=where["device"])

    def call() -> float:
        features.grad = weights.grad = None
        value = loss(features, weights, targets) / tokens
        value.backward()
        return value.item()  # waits for the device

    if device == "gpu":
        torch.cuda.reset_peak_memory_stats()
    peak = resident if device == "cpu" else torch.cuda.max_memory_allocated
    before = peak()
    times = harness.timed(call, calls)
    on = torch.cuda.get_device_name() if device == "gpu" else "cpu"
    return times | {"peak": peak() - before, "loss": call(), "on": on}


def torch_whole(*given) -> dict:
    from torch.nn.functional import cross_entropy

    return in_torch(lambda f, w, y: cross_entropy((f @ w.T).float(), y, reduction="sum"), *given)


def torch_chunks(*given) -> dict:
    from torch.nn.functional import cross_entropy
    from torch.utils.checkpoint import checkpoint

    chunk = CHUNKS[given[-1]]
    part = lambda f, w, y: cross_entropy((f @ w.T).float(), y, reduction="sum")
    loss = lambda f, w, y: sum(
        checkpoint(part, f[i : i + chunk], w, y[i : i + chunk], use_reentrant=False) for i in range(0, len(f), chunk)
    )
    return in_torch(loss, *given)


SIDES = {
    "jaxsft": ours,
    "jaxsft, summed": summed,
    "optax": optax_whole,
    "torch": torch_whole,
    "torch in chunks": torch_chunks,
}


def main() -> None:
    parser = harness.parser(__doc__, [*SIDES])
    parser.add_argument("--size", nargs=3, type=int, action="append", metavar=("TOKENS", "WIDTH", "VOCABULARY"))
    args = parser.parse_args()
    if args.side:
        case = json.loads(args.case)
        harness.finish(SIDES[args.side](case["size"], case["table"], args.calls, args.device) | {"work": 1})
        return
    rows = []
    for size in args.size or SIZES[args.device]:
        for table in TABLES:
            name = f"{' x '.join(f'{n:,}' for n in size)}, {DTYPES[args.device]}, {table}"
            found = harness.turns(__file__, {"name": name, "size": size, "table": table}, args.sides, args, unit="s")
            harness.show(found)
            rows += found
    harness.show(rows, args.json)


if __name__ == "__main__":
    main()
