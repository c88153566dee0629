"""The mixture of experts as part of a model: its balance, and the stacks of layers with and without one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsft import models
from jaxsft.models import FAMILIES
from jaxsft.models.moe import MoE, Routing, balance

N, E, K = 16, 4, 2


def test_balance_is_the_formula_over_counted_choices():
    draw = np.random.default_rng(0)
    odds = draw.dirichlet(np.ones(E), (3, N))
    chosen = np.argsort(-odds, axis=-1)[..., :K]
    load = np.zeros((3, E))
    for layer in range(3):
        for n in range(N):
            for e in chosen[layer, n]:
                load[layer, e] += 1 / N
    share = odds.mean(axis=1)
    expected = E * sum(load.mean(axis=0)[e] * share.mean(axis=0)[e] for e in range(E))
    assert float(balance(Routing(jnp.array(load), jnp.array(share)))) == pytest.approx(expected, rel=1e-6)
    even = jnp.full((3, E), 1 / E)
    assert float(balance(Routing(K * even, even))) == pytest.approx(K)


def test_padding_does_not_count_in_the_balance():
    config = models.DecoderConfig(32, 16, 24, 2, 2, 1, 8, 64, moe=MoE(experts=4, active=2, hidden=8))
    model = models.build(config)
    params = jax.jit(model.init)(jax.random.key(0))
    learn = jax.jit(lambda tokens, segments: model.learn({"params": params}, tokens, None, segments)[1])
    tokens = jax.random.randint(jax.random.key(1), (1, 12), 0, 32)
    alone = learn(tokens[:, :8], jnp.ones((1, 8), jnp.int32))
    padded = learn(tokens.at[:, 8:].set(0), (jnp.arange(12) < 8).astype(jnp.int32)[None])
    assert float(padded) == pytest.approx(float(alone), rel=1e-5)
    assert float(learn(tokens, jnp.ones((1, 12), jnp.int32))) != pytest.approx(float(alone), rel=1e-5)


def test_layers_without_a_mixture_have_a_stack_of_their_own():
    shape = {"model_type": "qwen3_moe", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48}
    shape |= {"num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 4}
    read = FAMILIES["qwen3_moe"].read_config
    assert models.decoder.stacks(read({**shape, "mlp_only_layers": [0, 5]})) == {
        "0-0": False,
        "1-4": True,
        "5-5": False,
    }
    alternate = read({**shape, "decoder_sparse_step": 2, "mlp_only_layers": [3]})
    assert list(models.decoder.stacks(alternate).values()) == [False, True, False, True]
    assert alternate.moe.dense == (0, 2, 3, 4)
