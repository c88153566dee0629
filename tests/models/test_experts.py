"""Experts against a loop over tokens, on one device and shared out over several."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsft import quant, sharding
from jaxsft.models import experts
from jaxsft.models.experts import mixture

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


# Lengths of data, fsdp, tensor, context, expert. Four experts do not divide by eight: then nobody's are cut.
ALL = [(1, 1, 1, 1, 4), (1, 1, 1, 1, 8), (1, 2, 2, 1, 2), (1, 1, 2, 2, 2)]
MESHES = {"adapter": ALL, "biases": [(1, 2, 2, 1, 2)], "nf4": [(2, 1, 2, 1, 2)]}


def of_kind(kind: str):
    """`some`, with an adapter; with biases, gate and up interleaved in one kernel; or packed, with an adapter."""
    x, chosen, weights, banks = some(low=0 if kind == "biases" else 2)
    if kind == "biases":
        kernel = jnp.stack([banks["gate"]["kernel"], banks["up"]["kernel"]], axis=-1).reshape(E, D, 2 * F)
        rows = jax.random.normal(jax.random.key(9), (E, 2 * F + D))
        banks = {
            "gate_up": {"kernel": kernel, "bias": rows[:, : 2 * F]},
            "down": {"kernel": banks["down"]["kernel"], "bias": rows[:, 2 * F :]},
        }
    if kind == "nf4":
        banks = {
            name: {"packed": quant.pack(bank.pop("kernel"), "nf4"), **bank} for name, bank in banks.items()
        }  # fmt: skip
    pair = lambda results: results if kind != "biases" else dict(zip(("gate", "up"), _halves(results), strict=True))
    return x, chosen, weights, banks, lambda results: ACT(pair(results))


def _halves(results):
    return results["gate_up"][..., ::2], results["gate_up"][..., 1::2]


@pytest.mark.parametrize("kind", MESHES)
def test_value_and_every_gradient_are_the_same_however_experts_and_tokens_are_shared_out(kind):
    """Every device's experts pull on tokens and weights: their gradients were once those of one device alone."""
    x, chosen, weights, banks, act = of_kind(kind)
    rows = lambda part: part.reshape(8, 2, -1)

    def pull(lengths):
        mesh = lengths and sharding.mesh(*lengths, devices=jax.devices()[: int(np.prod(lengths))])

        def loss(x, weights, learned):
            own = {name: {**banks[name], **leaves} for name, leaves in learned.items()}
            y = experts.spread(mesh, rows(x), rows(chosen), rows(weights), own, act)
            return (y * jnp.arange(D)).sum(), y

        learned = {name: {n: x for n, x in bank.items() if n != "packed"} for name, bank in banks.items()}
        return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(x, weights, learned)

    alone = jax.tree.leaves(pull(None))
    for lengths in MESHES[kind]:
        for one, shared in zip(alone, jax.tree.leaves(pull(lengths)), strict=True):
            np.testing.assert_allclose(shared, one, rtol=1e-4, atol=1e-3, err_msg=str(lengths))


@pytest.mark.parametrize("shape", [None, (2, 1, 2, 1, 2)], ids=str)
def test_dropout_falls_on_the_adapters_input_alone_and_is_right_on_average(shape):
    x, chosen, weights, banks = some(low=2)
    x, chosen, weights = (part.reshape(8, 2, -1) for part in (x, chosen, weights))
    mesh = shape and sharding.mesh(*shape)
    base = jax.tree.map(jnp.array, {name: {"kernel": bank["kernel"]} for name, bank in banks.items()})
    run = jax.jit(lambda banks, key: experts.spread(mesh, x, chosen, weights, banks, LINEAR, (0.5, key)))
    keys = jax.random.split(jax.random.key(3), 2)
    np.testing.assert_array_equal(run(base, keys[0]), run(base, keys[1]))  # nothing is dropped of the base
    first, again = run(banks, keys[0]), run(banks, keys[0])
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - run(banks, keys[1])).max() > 1
    # With products that are linear in each other's result the mean over masks is the answer without any.
    many = jax.jit(lambda keys: jax.lax.map(lambda key: run(banks, key), keys).mean(axis=0))
    without = experts.spread(None, x, chosen, weights, banks, LINEAR)
    assert np.abs(many(jax.random.split(jax.random.key(4), 4000)) - without).mean() < 0.1 * np.abs(without).mean()


def test_dora_of_an_expert_is_refused():
    x, chosen, weights, banks = some(low=2)
    banks["up"]["m"] = jnp.ones((E, F))
    with pytest.raises(ValueError, match=r"DoRA is not supported for experts; leave them out of tuning.lora.targets"):
        mixture(x, chosen, weights, banks, ACT)
