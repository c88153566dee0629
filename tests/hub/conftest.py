"""Small checkpoints, loaded and not, and an adapter."""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsft import hub, lora, tree
from jaxsft.lora import LoRA


@pytest.fixture(scope="session")
def base(tiny):
    """A bfloat16 checkpoint with the shipped tokenizer."""
    return tiny("llama", dtype="bfloat16", tokenizer=True, seed=1)


@pytest.fixture(scope="session")
def small(tiny):
    """A float32 checkpoint to read only."""
    return tiny("llama", num_hidden_layers=2, attention_bias=True, mlp_bias=True)


@pytest.fixture
def copy(small, tmp_path):
    """The same, to spoil."""
    return Path(shutil.copytree(small, tmp_path / "copy"))


@pytest.fixture(scope="session")
def loaded(base):
    return hub.load(str(base), dtype=jnp.bfloat16)


@pytest.fixture(scope="session")
def adapter(loaded):
    """An adapter on q and down whose B is not zero."""
    draw = np.random.default_rng(0)
    made = tree.flat(lora.init(jax.random.key(0), loaded[1], LoRA(rank=2, targets=".*/(q|down)")))
    return tree.nest({p: jnp.asarray(0.3 * draw.normal(size=x.shape), jnp.float32) for p, x in made.items()})
