"""What the benchmarks share: sides that take turns in processes of their own, and rows of figures.

A side is a function of a script that computes the same work as the others and returns `timed(...)`. Each runs in a
process of its own, so that its peak memory is its own; the sides take turns, so that a machine whose speed wanders
treats them alike; the median of all calls counts, and the lowest and highest are told. A side may run under another
interpreter, since some peers want packages that contradict ours: see run.py, which makes those environments.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]  # case, side, value, low, high, unit, peak_gb, core_s, first_s; or case, side, failed
BEGUN = "BENCHMARK_BEGUN"  # when the process of a side was started
PACKAGES = "jax flax optax torch transformers peft trl google-tunix numpy".split()


def parser(doc: str | None, sides: Sequence[str]) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--device", choices=["cpu", "gpu"], default="cpu")
    made.add_argument("--calls", type=int, default=4, help="timed calls a turn")
    made.add_argument("--turns", type=int, default=2, help="turns of each side")
    made.add_argument("--sides", nargs="+", choices=sides, default=list(sides), help="those that run; by default all")
    made.add_argument("--json", type=Path, metavar="FILE", help="where to write the rows")
    made.add_argument("--tunix", default="", metavar="PYTHON", help="an interpreter that has google-tunix")
    made.add_argument("--side", choices=sides, help="run one side in this process and print what was found as JSON")
    made.add_argument("--case", default="{}", help="of --side, as JSON")
    return made


def timed(call: Callable[[], Any], calls: int) -> dict[str, Any]:
    """Runs a call once, which compiles or warms up, then `calls` times.

    Args:
      call: waits for its result before it returns.
      calls: that are timed.
    """
    start = time.perf_counter()
    call()
    first, times, cores = time.perf_counter() - start, [], []
    for _ in range(calls):
        start, before = time.perf_counter(), time.process_time()
        call()
        times.append(time.perf_counter() - start)
        cores.append(time.process_time() - before)
    return {"first": first, "times": times, "cores": cores}


def since_start() -> dict[str, Any]:
    """What `timed` gives, of all that this process has done so far."""
    return {"first": 0.0, "times": [time.time() - float(os.environ[BEGUN])], "cores": [time.process_time()], "work": 1}


def finish(found: Mapping[str, Any]) -> None:
    """Prints what a side found, with the most memory its process had; of a GPU what the side itself says."""
    print(json.dumps({"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, **found}))


def turns(
    script: str, case: Mapping[str, Any], sides: Sequence[str], args: argparse.Namespace, unit: str = "tokens/s"
) -> list[Row]:
    """Runs sides in turns and says what each reached.

    Args:
      script: the file whose `--side` runs one.
      case: what the sides are told; "work" is what a call of theirs computes, in the unit's things.
      sides: their names; one that wants another interpreter and has none is left out, and that is said.
      args: of `parser`.
      unit: of the figures, such as tokens/s; s for the seconds of a call themselves.
    """
    pythons = {side: args.tunix if side == "tunix" else sys.executable for side in sides}
    found: dict[str, list[Any]] = {side: [] for side, python in pythons.items() if python}
    for side in set(sides) - set(found):
        print(f"{side} is left out: give its interpreter with --{side}", file=sys.stderr)
    for _ in range(args.turns):
        for side, kept in found.items():
            if None not in kept:
                command = [pythons[side], script, "--side", side, "--case", json.dumps(case)]
                command += ["--calls", str(args.calls), "--device", args.device]
                begun = {**os.environ, BEGUN: str(time.time())}
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=begun)
                kept.append(json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None)
    name = case["name"]
    return [{"case": name, "side": side, "unit": unit, **_figures(kept, unit)} for side, kept in found.items()]


def _figures(kept: list[Any], unit: str) -> dict[str, Any]:
    if None in kept:
        return {"failed": True}
    times = [(one["work"], seconds) for one in kept for seconds in one["times"]]
    rates = [seconds if unit == "s" else work / seconds for work, seconds in times]
    return {
        "value": statistics.median(rates),
        "low": min(rates),
        "high": max(rates),
        "core_s": statistics.median(seconds for one in kept for seconds in one["cores"]),
        "first_s": statistics.median(one["first"] for one in kept),
        "peak_gb": max(one["peak"] for one in kept) / 1e9,
        **{key: kept[0][key] for key in kept[0] if key not in ("times", "cores", "first", "peak", "work")},
    }


HEAD = ("case", "side", "median", "low", "high", "unit", "core s", "first s", "peak GB", "mfu")


def words(row: Row) -> tuple[str, ...]:
    """A row as its cells."""
    if row.get("failed"):
        return (row["case"], row["side"], "failed", *[""] * (len(HEAD) - 3))
    number = lambda key, digits: "" if row.get(key) is None else f"{row[key]:,.{digits}f}"
    digits = 0 if row["value"] >= 100 else 2
    figures = (number("value", digits), number("low", digits), number("high", digits), row["unit"])
    return (
        row["case"],
        row["side"],
        *figures,
        number("core_s", 2),
        number("first_s", 1),
        number("peak_gb", 2),
        number("mfu", 2),
    )


def show(rows: Sequence[Row], file: Path | None = None) -> None:
    """Prints rows as a table, and writes them where a file is named."""
    cells = [HEAD, *map(words, rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(HEAD))]
    for line in cells:
        print(
            "  ".join(
                cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
            )
        )
    if file:
        file.write_text(json.dumps(list(rows), indent=1), encoding="utf-8")


def machine() -> dict[str, Any]:
    """What the figures were measured on: processor, cores, memory, versions."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine()
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(memory / 1e9, 1),
        "python": platform.python_version(),
        "versions": versions(PACKAGES),
    }


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Those of the packages that are installed."""
    found = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
