"""Preparing data for training: jaxsft beside TRL, the same rows, template and tokenizer in the same run.

    pip install -e ".[parity]" && python benchmarks/data.py
    python benchmarks/data.py --rows 1000000 --peer-rows 0       # memory: one million rows, jaxsft alone

Rows are conversations of one question and one answer in English words, about 220 tokens with the shipped tokenizer, in
TRL's prompt-completion form, which both read as it is. Both tokenise with as many processes as there are cores, mask
the prompts, and pack to 1,024 tokens. Each run is a process of its own, in a folder of its own, so that nothing is
cached, and its peak memory is its own: that of the main process, and of the largest of those it started. Then jaxsft
runs again over what it has cached.
"""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BASE = Path(__file__).parents[1] / "jaxsft" / "assets" / "base"
NOTES = Path(__file__).parents[1] / "jaxsft" / "assets" / "text" / "notes.jsonl"
LENGTH = 1024
# The shipped template, with TRL's marks of what is generated.
TEMPLATE = (
    "{%- for message in messages %}{{- '<|im_start|>' + message['role'] + '\\n' }}{%- if message.role == 'assistant' %}"
    "{%- generation %}{{- message['content'] + '<|im_end|>' }}{%- endgeneration %}{{- '\\n' }}{%- else %}"
    "{{- message['content'] + '<|im_end|>\\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


def write_rows(path: Path, count: int) -> None:
    """Rows of words from the shipped notes, of lengths as alpaca has them (log-normal)."""
    draw = random.Random(0)
    words = " ".join(json.loads(line)["text"] for line in NOTES.read_text(encoding="utf-8").splitlines()).split()
    some = lambda mean: " ".join(draw.choices(words, k=max(1, int(draw.lognormvariate(mean, 0.7)))))
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            row = {
                "prompt": [{"role": "user", "content": some(2.5)}],
                "completion": [{"role": "assistant", "content": some(4.0)}],
            }
            file.write(json.dumps(row) + "\n")


def load_tokenizer():
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(BASE)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def run_jaxsft(path: str, workers: int, folder: str) -> dict:
    from jaxsft import data

    start = time.perf_counter()
    config = data.Config(train=path, max_length=LENGTH, workers=workers, cache=folder)
    _, _, report = data.load(config, load_tokenizer())
    seconds = time.perf_counter() - start
    tokens, packed = report.tokens, report.packed_rows
    return {"seconds": seconds, "tokens": tokens, "packed": packed, "efficiency": report.efficiency}


def run_trl(path: str, workers: int, folder: str) -> dict:
    import datasets
    import torch
    import trl
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(workers)
    tokenizer = load_tokenizer()
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **small))
    settings = {"output_dir": folder, "use_cpu": True, "bf16": False, "report_to": [], "gradient_checkpointing": None}
    args = trl.SFTConfig(max_length=LENGTH, packing=True, dataset_num_proc=workers, max_steps=1, **settings)
    start = time.perf_counter()
    rows = datasets.load_dataset("json", data_files=path, split="train", cache_dir=folder)
    prepared = trl.SFTTrainer(model, args, train_dataset=rows, processing_class=tokenizer).train_dataset
    seconds = time.perf_counter() - start
    tokens = sum(map(len, prepared["input_ids"]))
    return {
        "seconds": seconds,
        "tokens": tokens,
        "packed": len(prepared),
        "efficiency": tokens / len(prepared) / LENGTH,
    }


RUNS = {"jaxsft": run_jaxsft, "trl": run_trl}


def apart(side: str, path: Path, workers: int, folder: str) -> dict:
    """One side in a process of its own."""
    command = [sys.executable, __file__, "--side", side, "--path", str(path), "--workers", str(workers)]
    done = subprocess.run([*command, "--folder", folder], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{side} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=50_000, help="rows for jaxsft")
    parser.add_argument(
        "--peer-rows", type=int, default=50_000, help="the first so many of them for TRL; 0 leaves it out"
    )
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes that tokenise")
    parser.add_argument("--side", choices=RUNS, help="run one side here, for this script's own use")
    parser.add_argument("--path")
    parser.add_argument("--folder")
    args = parser.parse_args()
    if args.side:
        found = RUNS[args.side](args.path, args.workers, args.folder)
        peak = [resource.getrusage(who).ru_maxrss / 1e6 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        print(json.dumps(found | {"main_gb": peak[0], "worker_gb": peak[1]}))
        return
    with tempfile.TemporaryDirectory() as root:
        sizes = {"jaxsft": args.rows, "trl": args.peer_rows}
        files = {count: Path(root) / f"rows-{count}.jsonl" for count in set(sizes.values()) if count}
        for count, path in files.items():
            write_rows(path, count)
        shown = ", ".join(f"{count:,} rows {path.stat().st_size / 1e6:.0f} MB" for count, path in files.items())
        print(f"{args.workers} processes, {shown}")
        for label, side in (("jaxsft", "jaxsft"), ("jaxsft, again", "jaxsft"), ("TRL", "trl")):
            if count := sizes[side]:
                found = apart(side, files[count], args.workers, str(Path(root) / side))
                print(
                    f"{label:14} {found['seconds']:7.1f} s  {count / found['seconds']:9,.0f} rows/s  "
                    f"{found['tokens'] / found['seconds']:11,.0f} tokens/s  {found['packed']:,} packed rows at "
                    f"{found['efficiency']:.1%}  peak {found['main_gb']:.2f} GB, a worker {found['worker_gb']:.2f} GB"
                )


if __name__ == "__main__":
    main()
