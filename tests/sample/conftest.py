"""A small model whose greedy answers vary, and the same answers by one full forward pass a token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsft.models import DecoderConfig, build, logits

CONFIG = DecoderConfig(23, 16, 24, 2, heads=2, kv_heads=1, head_dim=8, max_position=64)
MODEL = build(CONFIG)
PROMPTS = [[5], [7, 3, 9, 9, 1], [4, 2, 0, 6, 8, 10, 12, 14, 16, 18, 20, 22]]
NEW, LENGTH = 9, 24


def drawn(model, seed=3):
    """Random weights, large enough that greedy answers vary."""
    leaves, form = jax.tree.flatten(jax.eval_shape(model.init, jax.random.key(0)))
    draw = np.random.default_rng(seed)
    return {"params": jax.tree.unflatten(form, [jnp.asarray(draw.normal(size=x.shape), jnp.float32) for x in leaves])}


def forward_of(model, variables):
    """row of tokens -> the scores of what follows each, by a full forward pass."""

    @jax.jit
    def run(tokens, real):
        return logits(model, variables, model.features(variables, tokens, None, real))[0]

    def forward(row):
        padded = np.array([[*row, *[0] * (LENGTH - len(row))]])
        return np.asarray(run(padded, (np.arange(LENGTH) < len(row)).astype(np.int32)[None])[: len(row)], np.float64)

    return forward


def likeliest(forward, prompt, count=NEW):
    """The likeliest tokens behind a prompt, one full forward pass each."""
    row = list(prompt)
    for _ in range(count):
        row.append(int(np.argmax(forward(row)[-1])))
    return row[len(prompt) :]


@pytest.fixture(scope="session")
def variables():
    return drawn(MODEL)


@pytest.fixture(scope="session")
def forward(variables):
    return forward_of(MODEL, variables)


@pytest.fixture(scope="session")
def greedy(forward):
    return [likeliest(forward, prompt) for prompt in PROMPTS]
