"""Steps of DPO: jaxsft beside TRL's DPOTrainer, the same checkpoint and pairs in the same run.

    pip install -e ".[parity]" && python benchmarks/dpo.py
    python benchmarks/dpo.py --data PAIRS.jsonl --tokenizer MODEL

The shape of benchmarks/step.py (512 wide, 8 layers) with the tokenizer's vocabulary and random weights, float32, rank
16 on every linear layer, AdamW, at most 512 tokens a document. A step of TRL is 4 pairs, padded to the longest of their
8 documents; one of jaxsft is 4 rows of 1,024 tokens, into which it packs what has place. Each run is a process of its
own, in turn, so that the peak memory is its own. Pairs a second are those of all the pairs over all their steps; TRL's
first step, which warms up, and the compilation of jaxsft's are told apart, and so is the time that the reference takes
where it runs once. Rows of jaxsft's last batch that are empty do not count, since more pairs would fill them.

LLaMA-Factory's dpo_en_demo, SmolLM2's tokenizer (49,152 pieces), --pairs 24, two quiet CPU cores. "core s" is processor
time a pair, "first s" the compilation or TRL's first step:

                                 pairs/s  core s/pair  first s  once s  peak GB  tokens
  jaxsft                           0.875         2.18      8.3             4.01   9,783
  jaxsft, prompts not shared       0.719         2.65      8.2             3.96  12,279
  jaxsft, reference precomputed    1.209         1.60      6.7    11.8     3.94   9,783
  TRL                              0.235         7.97     17.4             7.68  12,327

TRL's 48 tokens more than jaxsft's 12,279 are the line ends behind the last <|im_end|> of its 48 documents.
"""

import argparse
import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from quant import write_checkpoint
from step import LINEAR, RANK, ROWS, SHAPE

ROOT = Path(__file__).parents[1]
LENGTH = 512  # of one document
RATE = 2e-4


def clock() -> np.ndarray:
    """Seconds of the wall, and of all cores: the second is the same on a machine that others use, too."""
    return np.array([time.perf_counter(), time.process_time()])


def write_pairs(source: str, tokenizer, count: int, path: Path) -> None:
    """The first pairs that fit, in TRL's form, which both sides read as it is.

    Nothing is cut: the sides cut long conversations differently, and TRL leaves out those with a long prompt.
    """
    from jaxsft import data

    found = itertools.islice(_fitting(data.records(data.Config(train=source)), tokenizer), count)
    lines = [
        json.dumps({"prompt": prompt, "chosen": chosen, "rejected": rejected}) for prompt, chosen, rejected in found
    ]
    if len(lines) < count:
        raise SystemExit(f"{source} has {len(lines)} pairs of at most {LENGTH} tokens; ask for --pairs {len(lines)}")
    path.write_text("\n".join(lines), encoding="utf-8")


def _fitting(pairs, tokenizer):
    plain = lambda turns: turns if isinstance(turns, str) else [{"role": t.role, "content": t.content} for t in turns]
    for pair in pairs:
        prompt, *answers = (plain(turns) for turns in (pair.prompt, pair.chosen, pair.rejected))
        whole = [prompt + answer for answer in answers]
        if not isinstance(prompt, str):
            whole = [tokenizer.apply_chat_template(turns, tokenize=False) for turns in whole]
        if max(len(tokenizer(text)["input_ids"]) for text in whole) < LENGTH:  # one more may end a text
            yield prompt, *answers


def run_jaxsft(folder: str, path: str, reference: str = "live", share: bool = True) -> dict:
    import jax

    from jaxsft import data, hub, lora, objectives, optim, session, sharding, train, tuning

    mesh, once = sharding.mesh(data=1), 0.0
    config = data.Config(train=path, max_length=LENGTH, cache=folder)
    rows, _, report = data.load_pairs(config, hub.load_tokenizer(folder), "preference", share_prompt=share)
    learner = session.load(hub.Config(path=folder), tuning.Config(lora=lora.LoRA(rank=RANK)), mesh, seed=0)
    if reference == "precomputed":
        start = time.perf_counter()
        cache = Path(tempfile.mkdtemp(dir=folder))
        how = {"batch_size": ROWS, "mesh": mesh, "cache": cache, "model": hub.Config(path=folder)}
        rows = session.precompute(objectives.said(learner.model), learner, rows, **how)
        once = time.perf_counter() - start
    pairwise = objectives.of(objectives.Config(reference=reference))(learner.model)  # type: ignore[arg-type]
    tx, _ = optim.build(optim.Config(learning_rate=RATE), len(rows))
    state = train.init(learner.trainable, tx, jax.random.key(0), mesh)
    placed = list(train.place(data.batches(rows, ROWS, seed=0, epochs=1), mesh))
    start = time.perf_counter()
    step = train.make_step(pairwise.objective, tx).lower(state, learner.frozen, placed[0].batch).compile()
    first, times, losses = time.perf_counter() - start, [], []
    for one in [placed[0], *placed]:
        start = clock()
        state, metrics = step(state, learner.frozen, one.batch)
        losses.append(float(metrics["loss"]))
        times.append(clock() - start)
    # Every step takes the same time, whatever is in it: of the last batch only the rows that it has are counted.
    seconds, processor = np.median(times[1:], axis=0) * len(rows) / ROWS
    computed = report.tokens - (report.shared or 0)
    return {
        "seconds": seconds,
        "processor": processor,
        "first": first,
        "once": once,
        "tokens": computed,
        "loss": losses[0],
    }


def run_trl(folder: str, path: str, precompute: bool = False) -> dict:
    import datasets
    import torch
    import trl
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    lines = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    rows = datasets.Dataset.from_list(lines[:ROWS] + lines)  # the first step warms up, and does not count
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    settings = {"use_cpu": True, "bf16": False, "report_to": [], "save_strategy": "no", "disable_tqdm": True}
    settings |= {"gradient_checkpointing": False, "train_sampling_strategy": "sequential", "num_train_epochs": 1}
    args = trl.DPOConfig(
        output_dir=f"{folder}/trl",
        max_length=LENGTH,
        per_device_train_batch_size=ROWS,
        learning_rate=RATE,
        logging_steps=1,
        precompute_ref_log_probs=precompute,
        **settings,
    )
    times, begun = [], []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            begun.append(clock())

        def on_step_end(self, *args, **kwargs):
            times.append(clock() - begun[-1])

    start = time.perf_counter()
    trainer = trl.DPOTrainer(
        model,
        args=args,
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(folder),
        peft_config=LoraConfig(r=RANK, lora_alpha=32, lora_dropout=0.0, target_modules=LINEAR),
        callbacks=[Clock()],
    )
    once = time.perf_counter() - start if precompute else 0.0
    trainer.train()
    if len(trainer.train_dataset) != len(rows):
        raise SystemExit(f"TRL kept {len(trainer.train_dataset)} of {len(rows)} pairs")
    kept = trainer.train_dataset.select(range(ROWS, len(rows)))
    ends = [len(row["prompt_ids"]) + len(row[side]) for row in kept for side in ("chosen_ids", "rejected_ids")]
    loss = trainer.state.log_history[0]["loss"]
    seconds, processor = np.sum(times[1:], axis=0)
    return {
        "seconds": seconds,
        "processor": processor,
        "first": float(times[0][0]),
        "once": once,
        "tokens": sum(ends),
        "loss": loss,
    }


RUNS = {
    "jaxsft": run_jaxsft,
    "jaxsft, prompts not shared": lambda folder, path: run_jaxsft(folder, path, share=False),
    "jaxsft, reference precomputed": lambda folder, path: run_jaxsft(folder, path, "precomputed"),
    "TRL": run_trl,
    "TRL, reference precomputed": lambda folder, path: run_trl(folder, path, precompute=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", default=str(ROOT / "jaxsft/assets/preference/train.jsonl"), help="pairs, of any format"
    )
    parser.add_argument("--tokenizer", default=str(ROOT / "jaxsft/assets/base"), help="a model's folder")
    parser.add_argument("--pairs", type=int, default=24, help="how many; a multiple of 4")
    parser.add_argument("--only", nargs="*", choices=RUNS, default=list(RUNS), help="these runs; by default all")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the rows")
    parser.add_argument(
        "--side", nargs=3, metavar=("RUN", "FOLDER", "PAIRS"), help="run one in this process; print JSON"
    )
    args = parser.parse_args()
    if args.side:
        run, folder, path = args.side
        found = RUNS[run](folder, path)
        print(json.dumps(found | {"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6}))
        return
    from jaxsft import hub

    with tempfile.TemporaryDirectory() as root:
        tokenizer, path = hub.load_tokenizer(args.tokenizer), Path(root, "pairs.jsonl")
        write_pairs(args.data, tokenizer, args.pairs, path)
        write_checkpoint(Path(root), SHAPE | {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id})
        tokenizer.save_pretrained(root)
        print(f"{'':30} {'pairs/s':>8} {'core s/pair':>11} {'first s':>8} {'once s':>7}", end="")
        print(f" {'peak GB':>8} {'tokens':>7} {'loss':>7}", flush=True)
        rows = []
        for run in args.only:
            command = [sys.executable, __file__, "--side", run, root, str(path)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(f"{run} failed:\n{done.stderr[-3000:]}")
            one = json.loads(done.stdout.splitlines()[-1])
            speed, processor = args.pairs / one["seconds"], one["processor"] / args.pairs
            figures = {"value": speed, "unit": "pairs/s", "peak_gb": one["peak"], "first_s": one["first"]}
            rows.append({"case": f"{args.pairs} pairs", "side": run, **figures, "core_s": processor})
            print(f"{run:30} {speed:8.3f} {processor:11.2f} {one['first']:8.1f} {one['once']:7.1f}", end="")
            print(f" {one['peak']:8.2f} {one['tokens']:7,} {one['loss']:7.4f}", flush=True)
        if args.json:
            args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
