"""A tiny llama on the disk, its parameters, and adapter folders beside it."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxsft import hub, lora, models, tree
from jaxsft.hub.peft.names import CONFIG, FILE
from jaxsft.lora import LoRA

SPEC = LoRA(rank=3, alpha=12.0, dropout=0.25, rslora=True, targets=".*/(q|v|down)")
MODULES = {"attn/q": "self_attn.q_proj", "attn/v": "self_attn.v_proj", "mlp/down": "mlp.down_proj"}
FAMILY = models.FAMILIES["llama"]
PREFIX = "base_model.model."


def random(params, spec, seed=0):
    """An adapter in which what trains is random and what does not is as it must be."""
    draw, made = np.random.default_rng(seed), tree.flat(jax.device_get(lora.init(jax.random.key(0), params, spec)))
    trains = ("a", "b", "m")
    return tree.nest({
        p: draw.normal(size=x.shape).astype(np.float32) if p.rpartition("/")[2] in trains else x
        for p, x in made.items()
    })  # fmt: skip


def same(ours, theirs):
    ours, theirs = tree.flat(ours), tree.flat(theirs)
    assert set(ours) == set(theirs)
    for path in ours:
        np.testing.assert_array_equal(ours[path], theirs[path], err_msg=path)


def change(folder, **keys):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | keys))


def rewrite(folder, spoil):
    tensors = load_file(folder / FILE)
    spoil(tensors)
    save_file(tensors, folder / FILE)


def load(folder, params, config):
    return hub.load_adapter(str(folder), params, family=FAMILY, config=config)


@pytest.fixture(scope="module")
def base(tiny):
    """Its folder, with biases on attention's kernels."""
    return tiny("llama", attention_bias=True)


@pytest.fixture(scope="module")
def tied(tiny):
    return tiny("llama", tied=True)


@pytest.fixture(scope="module")
def config(base):
    return hub.read_config(base)[1]


@pytest.fixture(scope="module")
def params(config):
    """Shapes are all that a plain adapter needs of the base."""
    return hub.shapes(config)


@pytest.fixture(scope="module")
def weights(base):
    """The values, which are read when they are used."""
    return hub.on_disk(str(base))


@pytest.fixture(scope="module")
def adapter(params):
    return random(params, SPEC)


@pytest.fixture
def folder(adapter, tmp_path):
    hub.export_adapter(str(tmp_path), adapter, SPEC, family=FAMILY, base="org/base")
    return tmp_path
