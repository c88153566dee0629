"""The mixture of experts against a loop over tokens, on one device and shared out over several."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsft import models, sharding
from jaxsft.models import FAMILIES, moe
from jaxsft.models.moe import MoE, Routing, balance, mixture

N, D, F, E, K = 16, 8, 6, 4, 2
ACT = lambda results: jax.nn.silu(results["gate"]) * results["up"]
LINEAR = lambda results: results["gate"] + results["up"]


def some(key: int = 0, low: int = 0):
    """Tokens, choices, weights and banks; with `low` every bank has an adapter of that rank."""
    keys = iter(jax.random.split(jax.random.key(key), 32))
    draw = lambda *shape: jax.random.normal(next(keys), shape)
    banks = {name: {"kernel": draw(E, *size)} for name, size in {"gate": (D, F), "up": (D, F), "down": (F, D)}.items()}
    for bank in banks.values() if low else ():
        _, width, features = bank["kernel"].shape
        bank |= {"a": draw(E, width, low), "b": draw(E, low, features), "scale": jnp.arange(1.0, E + 1)}
    weights, chosen = jax.lax.top_k(jax.nn.softmax(draw(N, E)), K)
    return draw(N, D), chosen, weights, banks


def kernel_of(bank, e):
    change = bank["scale"][e] * bank["a"][e] @ bank["b"][e] if "a" in bank else 0
    return np.asarray(bank["kernel"][e] + change, np.float64)


def by_loop(x, chosen, weights, banks):
    x, chosen, weights, banks = jax.device_get((x, chosen, weights, banks))
    out = np.zeros((N, D))
    for n in range(N):
        for k in range(K):
            W = {name: kernel_of(bank, chosen[n, k]) for name, bank in banks.items()}
            gate, up = x[n] @ W["gate"], x[n] @ W["up"]
            out[n] += weights[n, k] * (gate / (1 + np.exp(-gate)) * up) @ W["down"]
    return out


@pytest.mark.parametrize("low", [0, 3], ids=["base", "adapter"])
def test_every_token_gets_the_weighed_answers_of_its_experts(low):
    parts = some(low=low)
    np.testing.assert_allclose(mixture(*parts, ACT), by_loop(*parts), rtol=2e-4, atol=2e-4)


def test_no_token_is_dropped_where_all_crowd_on_one_expert():
    x, chosen, weights, banks = some()
    chosen = jnp.full_like(chosen, 3).at[:, 1].set(1)
    expected = by_loop(x, chosen, weights, banks)
    np.testing.assert_allclose(mixture(x, chosen, weights, banks, ACT), expected, rtol=2e-4, atol=2e-4)


def test_experts_elsewhere_add_nothing():
    x, chosen, weights, banks = some()
    part = lambda first: mixture(x, chosen, weights, jax.tree.map(lambda w: w[first : first + 2], banks), ACT, first)
    whole = mixture(x, chosen, weights, banks, ACT)
    np.testing.assert_allclose(part(0) + part(2), whole, rtol=1e-4, atol=1e-5)
    assert np.abs(part(0)).max() > 0.1
    assert np.abs(part(2)).max() > 0.1


@pytest.mark.parametrize("shape", [(1, 1, 4), (2, 2, 2), (1, 1, 8)], ids=str)
def test_value_and_every_gradient_are_the_same_however_experts_and_tokens_are_shared_out(shape):
    """Every device's experts pull on tokens and weights: their gradients were once those of one device alone."""
    x, chosen, weights, banks = some(low=2)
    mesh = sharding.mesh(*shape, devices=jax.devices()[: int(np.prod(shape))])

    def pull(mesh):
        loss = lambda x, weights, banks: (moe._spread(mesh, x, chosen, weights, banks, ACT) * jnp.arange(D)).sum()
        return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(x, weights, banks)

    for alone, shared in zip(jax.tree.leaves(pull(None)), jax.tree.leaves(pull(mesh)), strict=True):
        np.testing.assert_allclose(shared, alone, rtol=1e-4, atol=1e-3)


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


@pytest.mark.parametrize("shape", [None, (2, 1, 4)], ids=str)
def test_dropout_falls_on_the_adapters_input_alone_and_is_right_on_average(shape):
    x, chosen, weights, banks = some(low=2)
    mesh = shape and sharding.mesh(*shape)
    base = jax.tree.map(jnp.array, {name: {"kernel": bank["kernel"]} for name, bank in banks.items()})
    run = jax.jit(lambda banks, key: moe._spread(mesh, x, chosen, weights, banks, LINEAR, (0.5, key)))
    keys = jax.random.split(jax.random.key(3), 2)
    np.testing.assert_array_equal(run(base, keys[0]), run(base, keys[1]))  # nothing is dropped of the base
    first, again = run(banks, keys[0]), run(banks, keys[0])
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - run(banks, keys[1])).max() > 1
    # With products that are linear in each other's result the mean over masks is the answer without any.
    many = jax.jit(lambda keys: jax.lax.map(lambda key: run(banks, key), keys).mean(axis=0))
    without = moe.mixture(x, chosen, weights, banks, LINEAR)
    assert np.abs(many(jax.random.split(jax.random.key(4), 4000)) - without).mean() < 0.1 * np.abs(without).mean()


def test_dora_of_an_expert_is_refused():
    x, chosen, weights, banks = some(low=2)
    banks["up"]["m"] = jnp.ones((E, F))
    with pytest.raises(ValueError, match=r"DoRA is not supported for experts; leave them out of tuning.lora.targets"):
        mixture(x, chosen, weights, banks, ACT)
