"""One training step: jaxsft beside transformers + PEFT and google-tunix, the same work in the same run.

    pip install -e ".[parity]" && python benchmarks/step.py
    python benchmarks/step.py --cases full "vocabulary 151,936" --calls 8
    python benchmarks/step.py --device gpu --json step.json

Random weights, random tokens of which every one is learned, AdamW, gradient clipping, rank 16 on every linear layer.
The shape of the CPU's cases is a Qwen 3 of 41.6 M parameters: 512 wide, 8 layers, 8/4 heads of 64, MLP 1536, vocabulary
32,000, tied; 4 rows of 512 tokens. `mfu` is the share of what the machine multiplies: of a GPU's bfloat16 peak as its
maker says it, of a CPU what a product of 2,048 x 2,048 float32 matrices reached in the same run. On a GPU the peer is
compiled (torch.compile) and rows are 2,048 and 4,096 tokens long.
"""

import json
import time
from typing import Any

import harness

RANK, ALPHA = 16, 32
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS = {  # here, and in PEFT
    "lora": ({}, {}),
    "dora": ({"dora": True}, {"use_dora": True}),
    "pissa": ({"init": "pissa"}, {"init_lora_weights": "pissa"}),
    "embed": ({"targets": "embed|blocks/.*"}, {"target_modules": [*LINEAR, "embed_tokens"]}),
    "head": ({"targets": "head|blocks/.*"}, {"target_modules": [*LINEAR, "lm_head"]}),
}


def shape(kind: str, layers: int, hidden: int, mlp: int, heads: tuple[int, int, int], vocabulary: int, tied: bool):
    """A config.json; heads are those of queries, those of keys, and their width."""
    return {
        "model_type": kind,
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "head_dim": heads[2],
        "tie_word_embeddings": tied,
    }


SHAPE = shape("qwen3", 8, 512, 1536, (8, 4, 64), 32_000, True)
QWEN = shape("qwen3", 28, 1024, 3072, (16, 8, 128), 151_936, True)
LLAMA_3B = shape("llama", 28, 3072, 8192, (24, 8, 128), 128_256, True)
LLAMA_8B = shape("llama", 32, 4096, 14_336, (32, 8, 128), 128_256, False)
ROWS, LENGTH = 4, 512
SMALL = {"shape": SHAPE, "method": "lora", "rows": ROWS, "length": LENGTH, "dtype": "float32", "remat": "dots"}
CPU: dict[str, dict[str, Any]] = {
    "lora": {},
    "lora, bfloat16": {"dtype": "bfloat16"},
    "full": {"method": "full"},
    "last 2 layers": {"method": "partial"},
    "qlora, nf4": {"method": "qlora"},
    "vocabulary 151,936": {"shape": {**SHAPE, "vocab_size": 151_936}},
    "vocabulary 151,936, bfloat16": {"shape": {**SHAPE, "vocab_size": 151_936}, "dtype": "bfloat16"},
    "1 row": {"rows": 1},
    "8 rows": {"rows": 8},
    "2 rows of 1,024": {"rows": 2, "length": 1024},
    "1 row of 2,048": {"rows": 1, "length": 2048},
}
LARGE = ("vocabulary 151,936", "vocabulary 151,936, bfloat16")
USUAL = ("lora", "lora, bfloat16", "full", "last 2 layers", "qlora, nf4", *LARGE)
BIG = {"dtype": "bfloat16", "remat": "block"}
GPU: dict[str, dict[str, Any]] = {
    f"{name}, {method}, {8192 // length} x {length:,}": {
        **BIG,
        "shape": given,
        "method": method,
        "rows": 8192 // length,
        "length": length,
    }
    for name, given, methods in (
        ("Qwen3-0.6B", QWEN, ("lora", "full")),
        ("Llama-3.2-3B", LLAMA_3B, ("lora", "full")),
        ("Llama-3.1-8B", LLAMA_8B, ("lora", "qlora")),
    )
    for method in methods
    for length in (2048, 4096)
}
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "4090": 165e12, "B200": 2250e12}


def jaxsft_side(case: dict, calls: int) -> dict:
    import jax
    import jax.numpy as jnp

    import jaxsft
    from jaxsft import models, optim, quant, sharding, train, tree, tuning

    jax.config.update("jax_enable_compilation_cache", case.get("cached", False))
    family, dtype = models.FAMILIES[case["shape"]["model_type"]], jnp.dtype(case["dtype"])
    method = case["method"].replace("qlora", "lora")
    lora = jaxsft.LoRA(rank=RANK, alpha=ALPHA, **ADAPTERS[case.get("adapter", "lora")][0])
    config = family.read_config(case["shape"])
    layers = 2 if method == "partial" else None
    plan = tuning.plan(tuning.Config(method=method, layers=layers, lora=lora), config.layers)
    model = models.build(config, dtype=dtype, remat=case["remat"])

    @jax.jit
    def base(key):
        params = model.init(key)
        params = models.split(params, plan.cut) if plan.cut else params
        keep = lambda path, x: x.astype(jnp.float32 if tree.matches(plan.trainable, f"params/{path}") else dtype)
        leaves = {path: keep(path, x) for path, x in tree.flat(params).items()}
        if case["method"] != "qlora":
            return {"params": tree.nest(leaves)}
        kernels = {path: leaves.pop(path) for path in list(leaves) if path.endswith("/kernel")}
        packed = {path.removesuffix("/kernel"): quant.pack(x, "nf4") for path, x in kernels.items()}
        return {"params": tree.nest(leaves), "packed": tree.nest(packed)}

    one = sharding.mesh(devices=jax.devices()[:1])
    trainable, frozen = tuning.apply(plan, base(jax.random.key(0)), jax.random.key(1), mesh=one, rules=family.rules)
    tx, _ = optim.build(optim.Config(), calls)
    state = train.init(trainable, tx, jax.random.key(2), one)
    step = train.make_step(jaxsft.supervised(model), tx, shardings=sharding.of(state))
    shape = case["rows"], case["length"]
    tokens = jax.random.randint(jax.random.key(3), shape, 0, config.vocab_size)
    ones = jnp.ones_like(tokens)
    batch = jaxsft.Tokens(tokens, ones > 0, jnp.broadcast_to(jnp.arange(shape[1]), shape), ones)
    del trainable

    def call() -> None:
        nonlocal state
        state, metrics = step(state, frozen, batch)
        jax.block_until_ready(metrics)

    found = harness.timed(call, calls) | {"work": shape[0] * shape[1]}
    return found | device_peak() | {"peak_flops": peak_flops(jax.devices()[0])}


def device_peak() -> dict:
    """The most bytes that were in use on a GPU; nothing on a CPU, where the process has them."""
    import jax

    device = jax.devices()[0]
    return {} if device.platform == "cpu" else {"peak": (device.memory_stats() or {})["peak_bytes_in_use"]}


def peak_flops(device: Any) -> float:
    """Products and sums a second: as the maker says, or as a large product of matrices reaches."""
    import jax
    import jax.numpy as jnp

    if device.platform != "cpu":
        return next((peak for name, peak in PEAKS.items() if name in device.device_kind), float("nan"))
    square, times = jnp.ones((2048, 2048)), []
    product = jax.jit(lambda x: x @ x)
    for _ in range(4):
        start = time.perf_counter()
        jax.block_until_ready(product(square))
        times.append(time.perf_counter() - start)
    return 2 * 2048**3 / min(times)


def peft_side(case: dict, calls: int) -> dict:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = {key: value for key, value in case["shape"].items() if key != "model_type"}
    config = AutoConfig.for_model(case["shape"]["model_type"], **kind, use_cache=False)
    torch.set_default_dtype(getattr(torch, case["dtype"]))
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config)
    torch.set_default_dtype(torch.float32)
    if case["method"] == "lora":
        own = {"target_modules": LINEAR, **ADAPTERS[case.get("adapter", "lora")][1]}
        model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, **own))
    elif case["method"] == "partial":
        model.requires_grad_(False)
        model.model.layers[-2:].requires_grad_(True)
    if case["remat"] == "block":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    model.train()
    learned = [p for p in model.parameters() if p.requires_grad]
    for p in learned:
        p.data = p.data.float() if case["method"] == "lora" else p.data
    run = torch.compile(model) if device == "cuda" else model
    optimizer = torch.optim.AdamW(learned, lr=2e-4, weight_decay=0.0, fused=device == "cuda")
    tokens = torch.randint(0, config.vocab_size, (case["rows"], case["length"]), device=device)
    precision = torch.autocast(device, torch.bfloat16, enabled=case["dtype"] == "bfloat16")

    def call() -> None:
        with precision:
            loss = run(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()

    found = harness.timed(call, calls) | {"work": tokens.numel()}
    return found | ({"peak": torch.cuda.max_memory_allocated()} if device == "cuda" else {})


def tunix_side(case: dict, calls: int) -> dict:
    """Its trainer's own compiled step, on its own model; it computes logits of all tokens, and has no packing."""
    import jax
    import jax.numpy as jnp
    import optax
    import qwix  # pyright: ignore[reportMissingImports]
    from flax import nnx
    from tunix.models.qwen3 import model as qwen3  # pyright: ignore[reportMissingImports]
    from tunix.sft import peft_trainer  # pyright: ignore[reportMissingImports]

    s, dtype = case["shape"], jnp.dtype(case["dtype"])
    config = qwen3.ModelConfig(
        num_layers=s["num_hidden_layers"],
        vocab_size=s["vocab_size"],
        embed_dim=s["hidden_size"],
        hidden_dim=s["intermediate_size"],
        num_heads=s["num_attention_heads"],
        head_dim=s["head_dim"],
        num_kv_heads=s["num_key_value_heads"],
        rope_theta=1_000_000,
        norm_eps=1e-6,
        use_tied_embedding=s["tie_word_embeddings"],
        dtype=dtype,
        param_dtype=dtype,
    )
    model = qwen3.Qwen3(config, rngs=nnx.Rngs(0))
    path = ".*(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
    provider = qwix.LoraProvider(module_path=path, rank=RANK, alpha=ALPHA)
    model = qwix.apply_lora_to_model(model, provider, rngs=nnx.Rngs(1), **model.get_model_input())
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(2e-4, weight_decay=0.0))
    trainer = peft_trainer.PeftTrainer(model, tx, peft_trainer.TrainingConfig(eval_every_n_steps=1000, max_steps=calls))
    step, _ = trainer.jit_train_and_eval_step()
    shape = case["rows"], case["length"]
    tokens = jax.random.randint(jax.random.key(3), shape, 0, s["vocab_size"])
    batch = {
        "input_tokens": tokens,
        "input_mask": jnp.ones(shape, bool),
        "positions": jnp.broadcast_to(jnp.arange(shape[1]), shape),
        "attention_mask": jnp.broadcast_to(jnp.tril(jnp.ones((shape[1], shape[1]), bool)), (shape[0], *shape[1:] * 2)),
    }
    return harness.timed(lambda: jax.block_until_ready(step(batch)), calls) | {"work": tokens.size} | device_peak()


SIDES = {"jaxsft": jaxsft_side, "transformers + PEFT": peft_side, "tunix": tunix_side}


def peers(case: dict) -> list[str]:
    """The sides that can do a case."""
    if case["method"] == "qlora":
        return ["jaxsft"]
    plain = case["method"] == "lora" and case["shape"]["model_type"] == "qwen3" and "adapter" not in case
    return [*SIDES] if plain else ["jaxsft", "transformers + PEFT"]


def flops(case: dict) -> float:
    """Products and sums of one token, as MFU counts them: nothing that is computed again, attention's lower half."""
    s, head = case["shape"], case["shape"]["num_attention_heads"] * case["shape"]["head_dim"]
    kv = s["num_key_value_heads"] * s["head_dim"]
    layer = s["hidden_size"] * (2 * head + 2 * kv) + 3 * s["hidden_size"] * s["intermediate_size"]
    products = s["num_hidden_layers"] * layer + s["vocab_size"] * s["hidden_size"]
    attention = s["num_hidden_layers"] * case["length"] * head  # scores and values, of half the keys on average
    passes = {"full": 3, "partial": 3}.get(case["method"], 2)  # no gradient to frozen weights
    if case["method"] == "partial":  # the backward pass ends below the last two layers
        trained = 2 * layer + s["vocab_size"] * s["hidden_size"]
        share = 2 / s["num_hidden_layers"]
        return (
            2 * products + 2 * attention + 4 * trained - 2 * s["vocab_size"] * s["hidden_size"] + 4 * attention * share
        )
    return 2 * products * passes + 2 * attention * 3


def main() -> None:
    parser = harness.parser(__doc__, [*SIDES])
    parser.add_argument("--cases", nargs="+", metavar="CASE", help=f"of a CPU, by default: {', '.join(USUAL)}; or all")
    parser.add_argument("--adapter", choices=ADAPTERS, help="one case: LoRA of this kind")
    args = parser.parse_args()
    if args.side:
        harness.finish(SIDES[args.side](json.loads(args.case), args.calls))
        return
    known = CPU if args.device == "cpu" else GPU
    names = args.cases or (USUAL if args.device == "cpu" else GPU)
    names = known if names == ["all"] else names
    cases = [{**SMALL, **known[name], "name": name} for name in names]
    if args.adapter:
        cases = [{**SMALL, "adapter": args.adapter, "name": args.adapter}]
    rows = []
    for case in cases:
        found = harness.turns(__file__, case, [side for side in peers(case) if side in args.sides], args)
        reached = next((row["peak_flops"] for row in found if "peak_flops" in row), None)
        for row in found:
            if reached and "value" in row:
                row["mfu"] = row["value"] * flops(case) / reached
        harness.show(found)
        rows += found
    harness.show(rows, args.json)


if __name__ == "__main__":
    main()
