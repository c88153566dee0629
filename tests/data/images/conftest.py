"""Small pictures of a few classes, drawn by their numbers, and a preprocessing to 8 x 8 pixels."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxsft.data import pixels

SIZE = 8


@pytest.fixture(scope="session")
def preprocess() -> pixels.Preprocess:
    return pixels.Preprocess(size=(SIZE, SIZE))


def draw(number: int, size: tuple[int, int] = (12, 10)) -> Image.Image:
    """A picture that no other number has; width and height."""
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (*size[::-1], 3), np.uint8))


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """12 pictures of three classes in folders, and the same as rows.jsonl."""
    root = tmp_path_factory.mktemp("images")
    rows = []
    for number in range(12):
        label = ("ant", "bee", "cat")[number % 3]
        file = root / "classes" / label / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        draw(number).save(file)
        rows.append({"image_path": str(file.relative_to(root)), "label": label})
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return root
