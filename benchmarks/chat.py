"""Fine-tuning on chat rows, from the rows to the weights: jaxsft beside TRL's SFTTrainer, the same rows and tokens.

    pip install -e ".[parity]" && python benchmarks/chat.py
    python benchmarks/chat.py --data alpaca_en_demo.json gsm8k/train.jsonl --tokenizer SmolLM2 --rows 64

The shape of benchmarks/step.py with the tokenizer's vocabulary and random weights, float32, rank 16 on every linear
layer, documents of at most 512 tokens, the loss on the answers alone. A step of TRL is 8 rows, padded to the longest of
them; `TRL, by length` groups rows of like length, its best setting that stays correct on a CPU: its packing needs a
flash kernel to keep documents apart. One of jaxsft is 4 packed rows of 512 tokens. An epoch is timed, without what came
before its second step (TRL) or its compilation; "learned" are the tokens with a loss, equal on all sides.

Rows without "messages" are read by their first question and answer: `question` and `answer`, or `instruction`, `input`
and `output`.
"""

import itertools
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import harness
from quant import write_checkpoint
from step import ALPHA, LINEAR, RANK, SHAPE

ROOT = Path(__file__).parents[1]
LENGTH, BATCH, PACKED = 512, 8, 4  # tokens of a document; rows of a step of TRL, and of ours


def conversations(source: str, tokenizer, count: int) -> Iterator[dict]:
    """The first rows of a file that fit, as prompt and completion, which both sides read as they are."""
    text = Path(source).read_text(encoding="utf-8")
    rows = json.loads(text) if source.endswith(".json") else map(json.loads, text.splitlines())
    return itertools.islice(filter(None, (_prompted(row, tokenizer) for row in rows)), count)


def _prompted(row: dict, tokenizer) -> dict | None:
    said = row.get("question") or "\n".join(filter(None, (row.get("instruction"), row.get("input"))))
    prompt = [{"role": "user", "content": said}]
    completion = [{"role": "assistant", "content": row.get("answer") or row["output"]}]
    whole = tokenizer.apply_chat_template(prompt + completion, tokenize=False)
    fits = len(tokenizer(whole)["input_ids"]) < LENGTH  # nothing is cut: the sides cut differently
    return {"prompt": prompt, "completion": completion} if fits else None


def jaxsft_side(case: dict, calls: int) -> dict:
    import jax

    from jaxsft import data, hub, lora, objectives, optim, session, sharding, train, tuning

    mesh, folder = sharding.mesh(devices=jax.devices()[:1]), case["folder"]
    config = data.Config(train=case["rows"], max_length=LENGTH, cache=tempfile.mkdtemp(dir=folder))
    rows, _, report = data.load(config, hub.load_tokenizer(folder))
    how = tuning.Config(lora=lora.LoRA(rank=RANK, alpha=ALPHA))
    learner = session.load(hub.Config(path=folder), how, mesh, seed=0)
    tx, _ = optim.build(optim.Config(), len(rows))
    state = train.init(learner.trainable, tx, jax.random.key(0), mesh)
    objective, shardings = objectives.supervised(learner.model), sharding.of(state)
    step = train.make_step(objective, tx, shardings=shardings)
    start = time.perf_counter()
    placed = list(train.place(data.batches(rows, PACKED, seed=0, epochs=1), mesh))
    step = step.lower(state, learner.frozen, placed[0].batch).compile()
    first, learned = time.perf_counter() - start, 0
    start, before = time.perf_counter(), time.process_time()
    for batch in train.place(data.batches(rows, PACKED, seed=0, epochs=1), mesh):
        state, metrics = step(state, learner.frozen, batch.batch)
        learned += metrics["trained_tokens"]
    learned = int(learned)
    times = {"times": [time.perf_counter() - start], "cores": [time.process_time() - before]}
    said = {"learned": learned, "padding": round(1 - report.tokens / (len(placed) * PACKED * LENGTH), 3)}
    return {"first": first, "work": report.rows, **times, **said}


def trl_side(case: dict, calls: int, by_length: bool = False) -> dict:
    import datasets
    import torch
    import trl
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    lines = [json.loads(line) for line in Path(case["rows"]).read_text(encoding="utf-8").splitlines()]
    settings = {"use_cpu": True, "bf16": False, "report_to": [], "save_strategy": "no", "disable_tqdm": True}
    settings |= {"gradient_checkpointing": False, "num_train_epochs": 1, "max_length": LENGTH, "logging_steps": 1000}
    order = "group_by_length" if by_length else "random"
    folder = case["folder"]
    args = trl.SFTConfig(
        output_dir=f"{folder}/trl",
        per_device_train_batch_size=BATCH,
        learning_rate=2e-4,
        train_sampling_strategy=order,
        **settings,
    )
    begun, ended, seen = [], [], {"learned": 0, "padded": 0, "all": 0}

    class Clock(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            begun.append((time.perf_counter(), time.process_time()))

        def on_step_end(self, *args, **kwargs):
            ended.append((time.perf_counter(), time.process_time()))

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    adapter = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=LINEAR)
    tokenizer, rows = AutoTokenizer.from_pretrained(folder), datasets.Dataset.from_list(lines)
    more = {"processing_class": tokenizer, "peft_config": adapter, "callbacks": [Clock()]}
    trainer = trl.SFTTrainer(model, args=args, train_dataset=rows, **more)
    collate = trainer.data_collator

    def counted(batch):
        made = collate(batch)
        seen["learned"] += int((made["labels"] >= 0).sum())
        seen["padded"] += int((made["attention_mask"] == 0).sum())
        seen["all"] += made["labels"].numel()
        return made

    trainer.data_collator = counted
    trainer.train()
    # From the end of the first step on, which warms up, what is between the steps counts, too.
    span = [end - start for start, end in zip(ended[0], ended[-1], strict=True)]
    first = ended[0][0] - begun[0][0]
    said = {"learned": seen["learned"], "padding": round(seen["padded"] / seen["all"], 3)}
    return {"first": first, "work": len(lines) - BATCH, "times": [span[0]], "cores": [span[1]], **said}


SIDES = {
    "jaxsft": jaxsft_side,
    "TRL": trl_side,
    "TRL, by length": lambda case, calls: trl_side(case, calls, by_length=True),
}


def main() -> None:
    parser = harness.parser(__doc__, [*SIDES])
    parser.add_argument("--data", nargs="+", default=[str(ROOT / "jaxsft/assets/quickstart/train.jsonl")], help="files")
    parser.add_argument("--tokenizer", default=str(ROOT / "jaxsft/assets/base"), help="a model's folder")
    parser.add_argument("--rows", type=int, default=64, help="of each file; a multiple of 8")
    args = parser.parse_args()
    if args.side:
        harness.finish(SIDES[args.side](json.loads(args.case), args.calls))
        return
    from transformers import AutoTokenizer

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for file in Path(args.tokenizer).iterdir():
            if file.name.startswith(("tokenizer", "special", "vocab", "merges", "chat_template", "generation")):
                shutil.copy(file, folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        write_checkpoint(Path(folder), {**SHAPE, "vocab_size": -(-len(tokenizer) // 64) * 64})
        for source in args.data:
            lines = [json.dumps(row) for row in conversations(source, tokenizer, args.rows)]
            if len(lines) % BATCH:
                raise SystemExit(
                    f"{source} has {len(lines)} rows that fit; ask for --rows {len(lines) // BATCH * BATCH}"
                )
            path = Path(folder) / "rows.jsonl"
            path.write_text("\n".join(lines), encoding="utf-8")
            case = {"name": Path(source).stem, "folder": folder, "rows": str(path)}
            found = harness.turns(__file__, case, args.sides, args, unit="examples/s")
            harness.show(found)
            print({row["side"]: (row.get("learned"), row.get("padding")) for row in found}, "learned, padding")
            rows += found
    harness.show(rows, args.json)


if __name__ == "__main__":
    main()
