"""Classifying images: what the input gives, what the step takes, and both together, beside torchvision + transformers.

    pip install -e ".[parity]" torchvision && python benchmarks/classify.py
    python benchmarks/classify.py --images FOLDER     # a folder with a folder for each class, instead of drawn ones
    python benchmarks/classify.py --peer false        # without torch

A ViT-Ti/16 (5.5 M parameters) at 224 pixels, all of it trained, batches of 16 in float32, AdamW. The images are JPEGs
of 500 x 375 pixels, decoded, resized and normalised on the way; crops and mirrors are drawn here on the device, there
by torchvision's transforms in the loader. Each figure comes from a process of its own, and the sides take turns. What
counts is how many images a turn got through, since batches wait in a queue; the median turn is told, and the best one.
"""

import argparse
import functools
import itertools
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

SHAPE = {
    "model_type": "vit",
    "architectures": ["ViTForImageClassification"],
    "hidden_size": 192,
    "intermediate_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 3,
    "image_size": 224,
    "patch_size": 16,
}
SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32}
CLASSES = 5


def draw(folder: Path, count: int, size: tuple[int, int] = (500, 375)) -> None:
    """JPEGs with as much detail as photos have: smoothed noise, about 60 kB each."""
    import numpy as np
    from PIL import Image

    chance = np.random.default_rng(0)
    for number in range(count):
        coarse = Image.fromarray(chance.integers(0, 256, (size[1] // 25, size[0] // 25, 3), np.uint8)).resize(size)
        fine = chance.normal(0, 12, (size[1], size[0], 3))
        file = folder / f"class{number % CLASSES}" / f"{number:04}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.clip(np.asarray(coarse) + fine, 0, 255).astype(np.uint8)).save(file, quality=85)


# ---- jaxsft ---------------------------------------------------------------------------------------------------------


def ours_input(folder: str, shape: dict, batch: int, workers: int) -> Iterator:
    """Batches of 8-bit pixels without end."""
    from jaxsft import data

    side = shape["image_size"]
    how = data.images.Config(train=folder, check="bytes", workers=workers)
    rows = data.images.load(how, data.pixels.Preprocess(size=(side, side))).train
    return data.images.batches(rows, batch, seed=0, epochs=None)


def ours_step(shape: dict, steps: int):
    """(state, batch) -> state, waiting until it is there; and the first state."""
    import jax

    from jaxsft import augment, data, models, objectives, optim, train

    config = models.with_labels(models.VISION["vit"], models.VISION["vit"].read_config(shape), CLASSES)
    model = models.build(config)
    normalise = functools.partial(data.pixels.normalise, data.pixels.Preprocess())
    tx, _ = optim.build(optim.Config(), steps)
    step = train.make_step(objectives.classification(model, normalise, how=augment.Config()).objective, tx)
    return step, train.init({"params": jax.jit(model.init)(jax.random.key(0))}, tx, jax.random.key(1))


def ours(part: str, folder: str, shape: dict, batch: int, steps: int, workers: int) -> list[float]:
    import jax

    found = ours_input(folder, shape, batch, workers)
    if part == "input":
        return timed(lambda: next(found), steps)
    from jaxsft import sharding, train

    step, state = ours_step(shape, steps)
    placed = train.place(found, sharding.mesh(devices=jax.devices()[:1]))
    if part == "step":
        placed = itertools.repeat(next(placed))

    def once() -> None:
        nonlocal state
        state, metrics = step(state, {}, next(placed).batch)
        jax.block_until_ready(metrics)

    return timed(once, steps)


# ---- torch ----------------------------------------------------------------------------------------------------------


def theirs_input(folder: str, shape: dict, batch: int, workers: int) -> Iterator:
    """Batches of normalised pixels and labels without end."""
    import torch
    from torchvision import datasets
    from torchvision.transforms import v2

    side = shape["image_size"]
    change = [v2.Resize((side, side)), v2.RandomResizedCrop(side, scale=(0.5, 1.0)), v2.RandomHorizontalFlip()]
    change += [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.5] * 3)]
    rows = datasets.ImageFolder(folder, v2.Compose(change))
    keep = {"persistent_workers": True} if workers else {}
    loader = torch.utils.data.DataLoader(rows, batch, shuffle=True, drop_last=True, num_workers=workers, **keep)
    while True:
        yield from loader


def theirs(part: str, folder: str, shape: dict, batch: int, steps: int, workers: int) -> list[float]:
    import torch
    from transformers import ViTConfig, ViTForImageClassification

    found = theirs_input(folder, shape, batch, workers)
    if part == "input":
        return timed(lambda: next(found), steps)
    torch.manual_seed(0)
    config = ViTConfig(**{k: v for k, v in shape.items() if k not in ("model_type", "architectures")})
    config.num_labels = CLASSES
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = ViTForImageClassification(config).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4, weight_decay=0.0)
    if part == "step":
        found = itertools.repeat(next(found))

    def once() -> None:
        pixels, labels = next(found)
        loss = model(pixel_values=pixels.to(device), labels=labels.to(device)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()

    return timed(once, steps)


def timed(once, steps: int) -> list[float]:
    """Seconds of each of some calls, the first ones, which compile and fill queues, left out."""
    for _ in range(2):
        once()
    found = []
    for _ in range(steps):
        start = time.perf_counter()
        once()
        found.append(time.perf_counter() - start)
    return found


SIDES = {"jaxsft": ours, "torchvision + transformers": theirs}


def apart(side: str, part: str, workers: int, args: argparse.Namespace) -> dict:
    """One figure from a process of its own."""
    command = [sys.executable, __file__, "--side", side, "--part", part, "--workers", str(workers)]
    command += ["--images", args.images, "--steps", str(args.steps), "--batch", str(args.batch)]
    done = subprocess.run([*command, *["--small"] * args.small], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{side}, {part} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", default="", help="a folder with a folder of images for each class")
    parser.add_argument("--count", type=int, default=160, help="images that are drawn where there is no folder")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=12, help="timed steps a turn")
    parser.add_argument("--turns", type=int, default=2, help="turns of each side")
    parser.add_argument("--most", type=int, default=2, help="processes that decode, at most")
    parser.add_argument("--peer", default="true", choices=["true", "false"])
    parser.add_argument("--small", action="store_true", help="a tiny network, to see that it runs")
    parser.add_argument("--side", choices=SIDES, help="run one side in this process and print its times as JSON")
    parser.add_argument("--part", choices=["input", "step", "both"])
    parser.add_argument("--workers", type=int, default=0)
    args = parser.parse_args()
    shape = {**SHAPE, **(SMALL if args.small else {})}
    if args.side:
        times = SIDES[args.side](args.part, args.images, shape, args.batch, args.steps, args.workers)
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        print(json.dumps({"times": times, "peak": max(one.ru_maxrss for one in used)}))
        return
    with tempfile.TemporaryDirectory() as drawn:
        if not args.images:
            draw(Path(drawn), args.count)
            args.images = drawn
        kinds = [("input", n) for n in range(args.most + 1)] + [("step", 0), ("both", 0), ("both", args.most)]
        sides = list(SIDES)[: 2 if args.peer == "true" else 1]
        print(f"{'':7} {'workers':>7}  {'':27} {'images/s':>9} {'best turn':>9} {'peak GB':>8}   batch {args.batch}")
        for part, workers in kinds:
            found: dict[str, list[dict]] = {side: [] for side in sides}
            for side in sides * args.turns:
                found[side].append(apart(side, part, workers, args))
            for side, turns in found.items():
                speed = [args.batch * len(turn["times"]) / sum(turn["times"]) for turn in turns]
                peak = max(turn["peak"] for turn in turns) / 1e6
                told = f"{statistics.median(speed):9.1f} {max(speed):9.1f} {peak:8.2f}"
                print(f"{part:7} {workers:7}  {side:27} {told}", flush=True)


if __name__ == "__main__":
    main()
