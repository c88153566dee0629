"""A tiny encoder with the tokenizer that ships with the untrained one."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import jaxsft

ENCODER = Path(jaxsft.BASE).parent / "encoder"


@pytest.fixture(scope="session")
def encoder(tiny):
    """encoder(files, ...) -> the folder of a random BERT of two layers, with a tokenizer.

    files: name -> the JSON that is written there.
    """

    def make(files: dict[str, object] | None = None, family: str = "bert", **keys) -> Path:
        shape = {"vocab_size": 1024, "num_hidden_layers": 2, "max_position_embeddings": 40}
        folder = tiny(family, **shape | keys)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(ENCODER / file, folder / file)
        for name, value in (files or {}).items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(json.dumps(value))
        return folder

    return make


@pytest.fixture(scope="session")
def words():
    """words(count, longest) -> texts of random letters, of 1 to `longest` words."""

    def make(count: int, longest: int, seed: int = 0) -> list[str]:
        draw = np.random.default_rng(seed)
        word = lambda: "".join(draw.choice(list("abcdefgh"), draw.integers(1, 5)))
        return [" ".join(word() for _ in range(draw.integers(1, longest + 1))) for _ in range(count)]

    return make
