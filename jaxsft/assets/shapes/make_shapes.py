"""Draws the pictures of configs/classify.yaml: five textures, of any two colours, size, angle and noise.

    python jaxsft/assets/shapes/make_shapes.py runs/shapes

writes train.jsonl with 1,500 pictures and heldout.jsonl with 120 others, the same ones every time. What tells a class
is its form alone: checks, cross, disc, dots, stripes. Colours and the brighter of the two are drawn, so the mean of a
picture says nothing, and a linear classifier of its pixels little.
"""

import json
import math
import random
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFilter

CLASSES = ("checks", "cross", "disc", "dots", "stripes")
SIDE, FINE = 32, 4  # pixels of a picture; how much finer it is drawn, for smooth edges
TRAIN, HELD = 1500, 120


def draw(label: str, chance: random.Random) -> Image.Image:
    """One picture of a class."""
    side = SIDE * FINE
    mask = Image.new("L", (2 * side, 2 * side), 0)
    pen, middle = ImageDraw.Draw(mask), side
    radius = side * chance.uniform(0.26, 0.4)
    box = lambda x, y, r: (x - r, y - r, x + r, y + r)
    if label == "disc":
        pen.ellipse(box(middle, middle, radius), fill=255)
    elif label == "cross":
        thick = radius * chance.uniform(0.25, 0.4)
        pen.rectangle((middle - radius, middle - thick, middle + radius, middle + thick), fill=255)
        pen.rectangle((middle - thick, middle - radius, middle + thick, middle + radius), fill=255)
    else:
        step = side * chance.uniform(0.16, 0.26)
        for i in range(int(2 * side / step) + 1):
            if label == "stripes":
                pen.rectangle((i * step, 0, i * step + step / 2, 2 * side), fill=255)
                continue
            for j in range(int(2 * side / step) + 1):
                if label == "dots":
                    pen.ellipse(box(i * step, j * step, step * 0.3), fill=255)
                elif (i + j) % 2:
                    pen.rectangle((i * step, j * step, (i + 1) * step, (j + 1) * step), fill=255)
    turned = mask.rotate(chance.uniform(-15, 15), Image.Resampling.BILINEAR)
    left, top = (side / 2 + side * chance.uniform(-0.08, 0.08) for _ in range(2))
    shape = turned.crop((round(left), round(top), round(left) + side, round(top) + side))
    shape = shape.resize((SIDE, SIDE), Image.Resampling.BOX)
    front, back = _colours(chance)
    image = Image.composite(Image.new("RGB", (SIDE, SIDE), front), Image.new("RGB", (SIDE, SIDE), back), shape)
    if chance.random() < 0.3:
        image = image.filter(ImageFilter.GaussianBlur(chance.uniform(0.3, 0.9)))
    return _noisy(image, chance.uniform(0, 25), chance)


def _colours(chance: random.Random) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Two colours that can be told apart."""
    while True:
        one, two = (tuple(chance.randrange(256) for _ in range(3)) for _ in range(2))
        if math.dist(one, two) > 110:
            return one, two


def _noisy(image: Image.Image, deviation: float, chance: random.Random) -> Image.Image:
    noise = lambda value: min(255, max(0, round(value + chance.gauss(0, deviation))))
    return Image.frombytes("RGB", image.size, bytes(noise(value) for value in image.tobytes()))


def main(folder: Path) -> None:
    chance = random.Random(0)
    for name, count in (("train", TRAIN), ("heldout", HELD)):
        (folder / name).mkdir(parents=True, exist_ok=True)
        rows = []
        for number in range(count):
            label = CLASSES[number % len(CLASSES)]
            file = folder / name / f"{number:04}.png"
            draw(label, chance).save(file)
            rows.append({"image_path": f"{name}/{file.name}", "label": label})
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    print(f"{TRAIN} and {HELD} pictures of {', '.join(CLASSES)} in {folder}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/shapes"))
