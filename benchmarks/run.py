"""The benchmarks as one suite: each beside its peers on this machine, a table, a plot, and JSON of it all.

    python benchmarks/run.py
    python benchmarks/run.py --only step chat --turns 3
    python benchmarks/run.py --device gpu

Peers need packages of their own: torch, transformers, PEFT and TRL beside jaxsft (requirements-torch.txt, as the extra
`parity` has them), google-tunix in an environment of its own (requirements-tunix.txt), since it wants another
safetensors. Both are made in --output the first time. A benchmark that fails is told at the end and does not keep the
others from running. What this writes: OUTPUT/results.json with machine and versions, OUTPUT/table.md, OUTPUT/plot.png.
"""

import argparse
import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import harness

HERE = Path(__file__).parent
DPO = ["--only", "jaxsft", "TRL"]
LONG = "--rows 2 --length 4096 --heads 32 --kv_heads 8 --head_dim 128 --dtype bfloat16".split()  # Llama 3.1 8B's
SUITE: dict[str, dict[str, list[list[str]]]] = {  # what runs on which device, with which arguments
    "cpu": {
        "step": [[]],
        "chat": [[]],
        "logprobs": [["--calls", "2"]],
        "attention": [[], ["--documents", "4"]],
        "generate": [["--batches", "8", "--calls", "2"]],
        "dpo": [DPO],
        "startup": [[]],
    },
    "gpu": {
        "step": [["--device", "gpu"]],
        "logprobs": [["--device", "gpu"]],
        "attention": [[*LONG, "--documents", "1"], [*LONG, "--documents", "8"]],
        "startup": [["--device", "gpu"]],
    },
}
ONE_PROCESS = ("attention", "dpo")  # that take no turns in processes of their own, or have their own options
OURS = "jaxsft"
PEERS = ("transformers + PEFT", "transformers", "TRL", "TRL, by length", "tunix", "torch", "torch in chunks", "optax")
PEERS += ("torch sdpa", "flash_attn", "cudnn")


def environment(folder: Path, requirements: str, *more: str) -> str:
    """The interpreter of an environment, which is made if it is not there."""
    python = folder / "bin" / "python"
    if not python.exists():
        print(f"== installing {requirements} into {folder}", flush=True)
        venv.create(folder, with_pip=True)
        install = [str(python), "-m", "pip", "install", "-q", "-r", str(HERE / requirements), *more]
        subprocess.run(install, check=True)
    return str(python)


def run(name: str, given: list[str], args: argparse.Namespace, pythons: tuple[str, str]) -> list[harness.Row]:
    """The rows of one benchmark; none where it failed."""
    file = args.output / f"{name}.json"
    file.unlink(missing_ok=True)
    command = [pythons[0], str(HERE / f"{name}.py"), "--json", str(file), *given]
    if name not in ONE_PROCESS:
        command += ["--turns", str(args.turns), "--tunix", pythons[1]]
    if name == "chat" and args.data:
        command += ["--data", *args.data]
    if name in ("chat", "dpo") and args.tokenizer:
        command += ["--tokenizer", args.tokenizer]
    print(f"== {name} {' '.join(given)}", flush=True)
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(HERE.parent)})
    if done.returncode or not file.exists():
        return []
    rows = json.loads(file.read_text(encoding="utf-8"))
    file.unlink()
    return [{"benchmark": name, **row} for row in rows]


def ratio(row: harness.Row, rows: list[harness.Row]) -> float | None:
    """How many times as fast a side is as the fastest other side of its case that is not ours."""
    peers = [
        one["value"]
        for one in rows
        if (one["benchmark"], one["case"]) == (row["benchmark"], row["case"])
        and "value" in one
        and one["side"] in PEERS
    ]
    if not peers or "value" not in row:
        return None
    return min(peers) / row["value"] if row["unit"] == "s" else row["value"] / max(peers)


def table(rows: list[harness.Row]) -> str:
    """Rows as Markdown; what is faster than the best peer has a ratio above 1."""
    lines = ["| benchmark | case | side | median | unit | lowest to highest | beside the best peer | peak GB |"]
    lines += ["|" + "---|" * 8]
    number = lambda x: "" if x is None else f"{x:,.0f}" if abs(x) >= 100 else f"{x:.3g}"
    for row in rows:
        spread = f"{number(row['low'])} to {number(row['high'])}" if "low" in row else ""
        beside = ratio(row, rows) if row["side"] not in PEERS else None
        cells = (row["benchmark"], row["case"], row["side"], number(row.get("value")) or "failed", row.get("unit", ""))
        cells += (spread, "" if beside is None else f"{beside:.2f}", number(row.get("peak_gb")))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(rows: list[harness.Row], file: Path) -> None:
    """How fast each of our sides is beside the best peer, a bar a case; 1 is as fast."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    bars = [(f"{row['benchmark']}: {row['case']}", row["side"], ratio(row, rows)) for row in rows]
    bars = [(case, side, found) for case, side, found in bars if found and side not in PEERS]
    figure, axes = plt.subplots(figsize=(9, 1 + 0.35 * max(len(bars), 1)), layout="constrained")
    names = [case if side == OURS else f"{case}, {side}" for case, side, _ in bars]
    axes.barh(names, [found for *_, found in bars], color="#4477aa")
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xlabel("times as fast as the best peer in the same run")
    axes.invert_yaxis()
    figure.savefig(file, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = {name for suite in SUITE.values() for name in suite}
    parser.add_argument("--device", choices=SUITE, default="cpu")
    parser.add_argument("--only", nargs="+", choices=sorted(known), help="by default all of the device")
    parser.add_argument("--turns", type=int, default=2, help="of each side")
    parser.add_argument("--output", type=Path, default=HERE.parent / "runs" / "benchmarks")
    parser.add_argument("--data", nargs="+", help="files of chat rows; by default those that ship")
    parser.add_argument("--tokenizer", default="", help="a model's folder; by default the one that ships")
    parser.add_argument("--python", default="", help="an interpreter that has jaxsft and requirements-torch.txt")
    parser.add_argument("--tunix", default="", metavar="PYTHON", help="an interpreter that has google-tunix")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    extra, accelerated = (".[cuda]", ["jax[cuda13]"]) if args.device == "gpu" else (".", [])
    ours = args.python or environment(
        args.output / "torch", "requirements-torch.txt", "-e", f"{HERE.parent}{extra[1:]}"
    )
    pythons = ours, args.tunix or environment(args.output / "tunix", "requirements-tunix.txt", *accelerated)
    rows, failed = [], []
    for name, runs in SUITE[args.device].items():
        for given in runs if name in (args.only or known) else ():
            found = run(name, given, args, pythons)
            failed += [] if found else [f"{name} {' '.join(given)}"]
            rows += found
            results = {"machine": harness.machine(), "rows": rows, "failed": failed}
            (args.output / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    text = table(rows)
    (args.output / "table.md").write_text(text, encoding="utf-8")
    plot(rows, args.output / "plot.png")
    print(text, f"written to {args.output}: results.json, table.md, plot.png", sep="\n")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
