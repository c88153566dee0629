"""What a training step moves between devices and computes on each, for 1, 8, 64 and 256 devices: no device, no weights.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --only "64 devices" --json scaling.json

The step of an 8-billion-parameter shape (that of benchmarks/plan.py) is compiled for arrays that do not exist, with
LoRA and in full, two microbatches, and its HLO is read: every collective with its bytes, times the turns of the loops
around it. The bytes are those that each of n devices receives in a ring: of an all-gather or all-to-all (n - 1) / n of
the result, of a reduce-scatter n - 1 results, of an all-reduce 2 (n - 1) / n, of a collective-permute all. CPU devices
stand for others; where a CPU gathers bfloat16 as float32, a GPU or TPU moves half. Each step is compiled in a process
of its own.
"""

import argparse
import json
import math
import re
import sys
import tempfile
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

from plan import LENGTH, SHAPE

from jaxsft import hub, objectives, optim, preflight, report, sharding, train, tree, tuning

MESHES = {  # data, fsdp, tensor
    "1 device": (1, 1, 1),
    "8 devices": (1, 8, 1),
    "64 devices": (1, 64, 1),
    "256 devices": (4, 64, 1),
}
BYTES = {
    "pred": 1,
    "s8": 1,
    "u8": 1,
    "u16": 2,
    "bf16": 2,
    "f16": 2,
    "s32": 4,
    "u32": 4,
    "f32": 4,
    "s64": 8,
    "u64": 8,
    "f64": 8,
}
COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*)$")
CALLED = re.compile(r"(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.-]+)")
BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


class Instruction(NamedTuple):
    name: str
    shape: str
    kind: str
    rest: str  # operands and attributes


class Moved(NamedTuple):
    """One collective of a step."""

    kind: str
    shape: str
    devices: int  # that take part
    times: int  # a step

    @property
    def received(self) -> float:
        """Bytes that a device receives each time."""
        n, size = self.devices, size_of(self.shape)
        share = {"reduce-scatter": n - 1, "all-reduce": 2 * (n - 1) / n, "collective-permute": 1}
        return size * share.get(self.kind, (n - 1) / n)


def dims(shape: str) -> list[tuple[str, list[int]]]:
    """The arrays of a shape.

    Example:
      >>> dims("(bf16[8,4]{1,0}, f32[])")
      [('bf16', [8, 4]), ('f32', [])]
    """
    return [(kind, [int(n) for n in text.split(",") if n]) for kind, text in re.findall(r"(\w+)\[([\d,]*)\]", shape)]


def size_of(shape: str) -> int:
    """Bytes of a shape."""
    return sum(BYTES.get(kind, 4) * math.prod(numbers) for kind, numbers in dims(shape))


def computations(text: str) -> tuple[str, dict[str, list[Instruction]]]:
    """The computations of a module's text by name, and which is the first."""
    found, entry, name = {}, "", ""
    for line in text.splitlines():
        if line.endswith("{") and (head := re.match(r"^(ENTRY )?%?([\w.-]+) \(", line)):
            name = head[2]
            found[name] = []
            entry = name if head[1] else entry
        elif match := INSTRUCTION.match(line):
            found[name].append(Instruction(*match.groups()))
    return entry, found


def visits(text: str) -> Iterator[tuple[Instruction, int, dict[str, str]]]:
    """Every instruction that runs, how often, and the shapes of its computation; of branches all."""
    entry, found = computations(text)
    shapes = {name: {one.name: one.shape for one in body} for name, body in found.items()}

    def walk(name: str, times: int) -> Iterator[tuple[Instruction, int, dict[str, str]]]:
        for one in found[name]:
            yield one, times, shapes[name]
            turns = 1
            if one.kind == "while":
                known = re.search(r'known_trip_count":\{"n":"(\d+)"', one.rest)
                turns = int(known[1]) if known else 1
            if one.kind not in ("all-reduce", "reduce-scatter", "reduce", "scatter", "sort", "reduce-window", "map"):
                inner = CALLED.findall(one.rest)
                inner += [name.strip(" %") for names in BRANCHES.findall(one.rest) for name in names.split(",")]
                for called in inner:
                    yield from walk(called, times * turns)

    return walk(entry, 1)


def group(rest: str) -> int:
    """How many devices take part in a collective.

    Example:
      >>> group("replica_groups=[4,2]<=[8]"), group("replica_groups={{0,1,2},{3,4,5}}")
      (2, 3)
      >>> group("replica_groups=mesh['a'=8,'b'=4], device_ids=([4,8]T(1,0)) {'b'}")
      4
      >>> group("replica_groups=mesh['a'=8,'b'=4] {'a':(2)4,'b'}")
      16
    """
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", rest):
        lengths = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        parts = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", named[2])
        return math.prod(int(part or lengths[axis]) for axis, part in parts)
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]", rest):
        return int(iota[1])
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", rest)
    return len(listed[1].split(",")) if listed else 1


def collectives(text: str) -> list[Moved]:
    """The collectives of a compiled step."""
    found = []
    for one, times, _ in visits(text):
        kind = one.kind.removesuffix("-start")
        if kind in COLLECTIVES:
            found.append(Moved(kind, one.shape, 2 if kind == "collective-permute" else group(one.rest), times))
    return [one for one in found if one.devices > 1]


def flops(text: str) -> int:
    """Floating-point operations of a device's matrix products, loops counted; XLA's own figure counts a loop once."""
    total = 0
    for one, times, shapes in visits(text):
        if one.kind == "dot":
            names = re.findall(r"%?([\w.-]+)", one.rest.split(")")[0])
            left = next(shapes[name] for name in names if name in shapes)
            over = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.rest)
            (_, numbers), (_, result) = dims(left)[0], dims(one.shape)[0]
            inner = math.prod(numbers[int(n)] for n in over[1].split(",")) if over and over[1] else 1
            total += 2 * times * inner * math.prod(result)
    return total


PIECES = 2  # microbatches


def step_of(shape: dict, mesh: tuple[int, int, int], method: str, *, length: int = LENGTH) -> tuple[str, int]:
    """The HLO of a compiled step, and the parameters of the base: a row a device in each microbatch, remat block."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(shape))
        where = sharding.Config(*mesh)
        sections = preflight.Sections(
            hub.Config(folder, "bfloat16", "block"),
            tuning.Config(method, lora=tuning.LoRA(rank=16) if method == "lora" else tuning.LoRA()),  # type: ignore
            optim.Config(),
            train.Config(batch_size=where.data * where.fsdp * where.expert * PIECES, microbatches=PIECES),
            where,
            length,
        )
        preflight.pretend(where)
        step = preflight.compiled(preflight.over_tokens(objectives.supervised), sections)
        base = tree.combine(
            {"params": step.state.trainable.get("params", {})}, {"params": step.frozen.get("params", {})}
        )
        return step.compiled.as_text(), tree.count(base)


def summary(text: str, parameters: int) -> dict:
    """What a step moves and computes, and how often a microbatch gathers the weights: numbers over all parameters."""
    moved = collectives(text)
    totals = {kind: sum(one.received * one.times for one in moved if one.kind == kind) for kind in COLLECTIVES}
    largest = sorted({(size_of(one.shape), one.kind, one.shape.split("{")[0]) for one in moved}, reverse=True)[:4]
    numbers = lambda shape: sum(math.prod(n) for kind, n in dims(shape) if kind in ("bf16", "f32", "u16"))
    gathered = sum(numbers(one.shape) * one.times for one in moved if one.kind == "all-gather")
    visits = gathered / parameters / PIECES
    return {"flops": flops(text), "received": totals, "largest": largest, "visits": visits}


def measure(mesh: tuple[int, int, int], method: str) -> dict:
    return summary(*step_of(SHAPE, mesh, method))


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--only", action="append", choices=MESHES, help="a mesh; all by default")
    parser.add_argument("--json", type=Path, help="a file for the figures")
    given = parser.parse_args()
    rows, found = [], {}
    for name in given.only or MESHES:
        for method in ("lora", "full"):
            with get_context("spawn").Pool(1) as pool:
                one = found[f"{name}, {method}"] = pool.apply(measure, (MESHES[name], method))
            gb = [f"{one['received'][kind] / 1e9:.2f}" for kind in COLLECTIVES]
            rows.append((name, method, f"{one['flops'] / 1e12:.1f}", *gb, f"{one['visits']:.2f}"))
            print(*rows[-1], *one["largest"], file=sys.stderr, flush=True)
    heads = ("devices", "tuning", "TFLOP", *COLLECTIVES, "gathers")
    report.table("a step on each device; GB received; gathers of a weight, a microbatch", heads, rows)
    if given.json:
        given.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
