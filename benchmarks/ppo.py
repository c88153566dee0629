"""Iterations of reinforcement learning: jaxsft's GRPO and PPO beside TRL's GRPOTrainer, on the same checkpoint.

    pip install -e ".[parity]" && python benchmarks/ppo.py

The shape of benchmarks/step.py (512 wide, 8 layers) with the shipped tokenizer's vocabulary and random weights,
float32, LoRA of rank 16 on every linear layer. An iteration is 8 prompts, 8 answers to each of at most 64 tokens
(random weights hardly ever end one), a reward that counts letters, and one optimizer step over all 64. PPO has 64
prompts, an answer to each, a reference and a critic with an adapter of its own. TRL 1.16 has no PPO any more. Each
run is a process of its own; the iterations before the clock starts compile.
"""

import argparse
import json
import os
import resource
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from quant import write_checkpoint
from step import LINEAR, RANK, SHAPE

ROOT = Path(__file__).parents[1]
NEW, PROMPTS, ANSWERS = 64, 8, 8
WARM = 2  # iterations before the clock starts
REWARD = "def letters(prompt, completion):\n    return sum(map(str.isalpha, completion)) / 100\n"


def run_jaxsft(script: str, root: str, iterations: int) -> dict:
    """Runs a script of ours and reads its metrics."""
    one = {"grpo": (PROMPTS, ANSWERS, "--grpo.method dapo"), "ppo": (PROMPTS * ANSWERS, 1, "--ppo.kl_coef 0.05")}
    prompts, samples, more = one[script]
    sys.argv = [script, *more.split(), "--model.path", root, "--data.train", f"{root}/prompts.jsonl"]
    sys.argv += ["--reward.functions", f"{{{root}/reward.py:letters: 1}}", "--rollout.max_new_tokens", str(NEW)]
    sys.argv += ["--train.iterations", str(WARM + iterations), "--train.prompts", str(prompts)]
    sys.argv += ["--train.samples", str(samples), "--train.epochs", "1", "--train.eval_every", "0"]
    sys.argv += ["--tuning.lora.rank", str(RANK), "--data.max_length", "64", "--data.cache", f"{root}/cache"]
    sys.argv += ["--run.output_dir", f"{root}/{script}", "--run.overwrite", "true", "--export.merged", "false"]
    runpy.run_path(str(ROOT / "scripts" / f"{script}.py"), run_name="__main__")
    lines = [json.loads(line) for line in Path(root, script, "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    rollout, update = (
        statistics.median(line[f"{kind}_seconds"] for line in lines[WARM:]) for kind in ("rollout", "update")
    )
    return {"seconds": rollout + update, "rollout": rollout, "length": lines[-1]["length"]}


def run_trl(root: str, iterations: int) -> dict:
    import datasets
    import torch
    import trl
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    rows = [json.loads(line) for line in Path(root, "prompts.jsonl").read_text(encoding="utf-8").splitlines()]
    letters = lambda completions, **_: [sum(map(str.isalpha, one[0]["content"])) / 100 for one in completions]
    settings = {"use_cpu": True, "bf16": False, "report_to": [], "save_strategy": "no", "disable_tqdm": True}
    args = trl.GRPOConfig(
        output_dir=f"{root}/trl",
        max_steps=WARM + iterations,
        per_device_train_batch_size=PROMPTS * ANSWERS,
        num_generations=ANSWERS,
        max_completion_length=NEW,
        loss_type="dapo",
        gradient_checkpointing=False,
        logging_steps=1,
        **settings,
    )
    begun, times, drawn = [], [], []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            begun.append(time.perf_counter())

        def on_step_end(self, *args, **kwargs):
            times.append(time.perf_counter() - begun[-1])

    class Timed(trl.GRPOTrainer):
        def _generate(self, *args, **kwargs):
            start = time.perf_counter()
            found = super()._generate(*args, **kwargs)
            drawn.append(time.perf_counter() - start)
            return found

    trainer = Timed(
        AutoModelForCausalLM.from_pretrained(root, dtype=torch.float32),
        reward_funcs=[letters],
        args=args,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(root),
        peft_config=LoraConfig(r=RANK, lora_alpha=32, lora_dropout=0.0, target_modules=LINEAR),
        callbacks=[Clock()],
    )
    trainer.train()
    length = trainer.state.log_history[WARM]["completions/mean_length"]
    return {"seconds": statistics.median(times[WARM:]), "rollout": statistics.median(drawn[WARM:]), "length": length}


RUNS = {
    "jaxsft, GRPO": lambda root, iterations: run_jaxsft("grpo", root, iterations),
    "TRL, GRPO": run_trl,
    "jaxsft, PPO": lambda root, iterations: run_jaxsft("ppo", root, iterations),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=5, help="that are timed; the median counts")
    parser.add_argument("--only", nargs="*", choices=RUNS, default=list(RUNS), help="these runs; by default all")
    parser.add_argument("--side", nargs=2, metavar=("RUN", "FOLDER"), help="run one in this process; print JSON")
    args = parser.parse_args()
    if args.side:
        run, root = args.side
        found = RUNS[run](root, args.iterations)
        print(json.dumps(found | {"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6}))
        return
    from jaxsft import hub

    with tempfile.TemporaryDirectory() as root:
        tokenizer = hub.load_tokenizer(str(ROOT / "jaxsft/assets/base"))
        write_checkpoint(Path(root), SHAPE | {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id})
        tokenizer.save_pretrained(root)
        Path(root, "reward.py").write_text(REWARD, encoding="utf-8")
        questions = (ROOT / "jaxsft/assets/quickstart/train.jsonl").read_text(encoding="utf-8").splitlines()[:128]
        rows = [
            json.dumps({"prompt": [{"role": "user", "content": json.loads(one)["instruction"]}]}) for one in questions
        ]
        Path(root, "prompts.jsonl").write_text("\n".join(rows), encoding="utf-8")
        print(f"{'':14} {'episodes/s':>10} {'s/iteration':>11} {'drawing':>8} {'peak GB':>8} {'length':>7}", flush=True)
        for run in args.only:
            command = [sys.executable, __file__, "--iterations", str(args.iterations), "--side", run, root]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(f"{run} failed:\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}")
            one = json.loads(done.stdout.splitlines()[-1])
            share, speed = one["rollout"] / one["seconds"], PROMPTS * ANSWERS / one["seconds"]
            print(f"{run:14} {speed:10.2f} {one['seconds']:11.2f} {share:8.0%} {one['peak']:8.2f}", end="")
            print(f" {one['length']:7.1f}", flush=True)


if __name__ == "__main__":
    main()
