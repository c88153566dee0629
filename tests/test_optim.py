import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxsft import optim, tree
from jaxsft.models import EncoderConfig, build
from jaxsft.optim import Config

KINDS = ["cosine", "linear", "constant"]


def plain(step, kind, peak, steps, warmup, final):
    """The learning rate of one step, as the configuration describes it."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, steps - warmup))
    if kind == "constant":
        return peak
    left = 1 - done if kind == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return peak * final + peak * (1 - final) * left


def params(seed=0):
    draw = np.random.default_rng(seed)
    shapes = {
        "params/embed/table": (4, 3),
        "params/blocks/0-1/attn/q/kernel": (2, 3, 3),
        "params/blocks/0-1/attn/q/bias": (2, 3),
        "params/norm/scale": (3,),
        "lora/blocks/0-1/attn/q/a": (2, 3, 2),
        "lora/blocks/0-1/attn/q/b": (2, 2, 3),
        "lora/blocks/0-1/attn/q/m": (2, 3),
        "lora/embed/a": (4, 2),
        "lora/embed/b": (2, 3),
    }
    return tree.nest({path: jnp.asarray(draw.normal(size=shape), jnp.float32) for path, shape in shapes.items()})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("steps", "warmup", "final"), [(10, 0, 0.0), (10, 3, 0.1), (1, 0, 0.0), (4, 4, 0.5)])
def test_schedules_equal_a_plain_loop(kind, steps, warmup, final):
    rate = optim.schedule(0.3, kind, steps, warmup_steps=warmup, final_ratio=final)
    found = [float(rate(step)) for step in range(steps + 3)]
    np.testing.assert_allclose(found, [plain(s, kind, 0.3, steps, warmup, final) for s in range(steps + 3)], atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_step_learns_and_the_warmup_ends_at_the_peak(kind):
    rate = optim.schedule(1.0, kind, 100, warmup_steps=5)
    assert float(rate(0)) > 0
    assert float(rate(4)) == float(rate(5)) == 1.0
    assert np.all(np.diff([float(rate(s)) for s in range(5, 100)]) <= 0)


def test_an_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match="'step' is not known; known are cosine, linear, constant"):
        optim.schedule(1.0, "step", 10)


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_the_optimizer_is_the_papers_adamw_with_clipping(clip):
    config = Config(
        learning_rate=0.1, schedule="linear", warmup_steps=2, weight_decay=0.03, clip=clip, beta2=0.95, eps=1e-6
    )
    tx, _ = optim.build(config, 6)
    state = tx.init(params())
    update = jax.jit(
        lambda grads, state, current: (lambda u, s: (optax.apply_updates(current, u), s))(
            *tx.update(grads, state, current)
        )
    )
    current = params()
    ours = {path: np.asarray(x, np.float64) for path, x in tree.flat(params()).items()}
    m = {path: np.zeros_like(x) for path, x in ours.items()}
    v = {path: np.zeros_like(x) for path, x in ours.items()}
    for step in range(6):
        grads = params(seed=step + 1)
        current, state = update(grads, state, current)
        g = {path: np.asarray(x, np.float64) for path, x in tree.flat(grads).items()}
        norm = math.sqrt(sum((x**2).sum() for x in g.values()))
        rate = plain(step, "linear", 0.1, 6, 2, 0.0)
        for path in ours:
            each = g[path] * min(1.0, clip / norm) if clip else g[path]
            m[path] = 0.9 * m[path] + 0.1 * each  # Loshchilov and Hutter 2017, algorithm 2
            v[path] = 0.95 * v[path] + 0.05 * each**2
            first, second = m[path] / (1 - 0.9 ** (step + 1)), v[path] / (1 - 0.95 ** (step + 1))
            decay = 0.0 if path.endswith(("bias", "scale")) else 0.03
            ours[path] -= rate * (first / (np.sqrt(second) + 1e-6) + decay * ours[path])
    for path, leaf in tree.flat(current).items():
        np.testing.assert_allclose(leaf, ours[path], rtol=2e-5, atol=2e-6, err_msg=path)


def test_only_kernels_tables_and_adapters_decay():
    tx, rate = optim.build(Config(learning_rate=0.5, schedule="constant", weight_decay=0.1, clip=0.0), 4)
    zeros = jax.tree.map(jnp.zeros_like, params())
    updates, _ = jax.jit(lambda grads, given: tx.update(grads, tx.init(given), given))(zeros, params())
    for path, update in tree.flat(updates).items():
        shrink = 0.0 if path.endswith(("bias", "scale")) else 0.1
        np.testing.assert_allclose(update, -float(rate(0)) * shrink * tree.flat(params())[path], rtol=1e-6)


def test_of_an_encoder_all_but_norms_and_biases_decays():
    shapes = tree.flat(
        jax.eval_shape(build(EncoderConfig(8, 4, 4, 2, heads=1, max_position=4)).init, jax.random.key(0))
    )
    rests = {path for path in shapes if not tree.matches(optim.DECAYS, f"params/{path}")}
    assert rests == {path for path in shapes if path.endswith(("/scale", "/bias"))}
    assert {"embed/positions", "embed/types", "mlm/dense/kernel"} <= shapes.keys() - rests


def test_clipping_bounds_the_global_norm_and_leaves_small_gradients_alone():
    small, big = ({"w": jnp.array([3.0, 4.0]) * size} for size in (0.1, 10.0))
    chain = optim.build(Config(learning_rate=1.0, schedule="constant", clip=1.0, eps=1e3), 4)[0]
    free = optim.build(Config(learning_rate=1.0, schedule="constant", clip=0.0, eps=1e3), 4)[0]
    # A large eps makes the first Adam step proportional to the gradient, so that its size shows.
    step = lambda tx, grads: np.asarray(tx.update(grads, tx.init(grads), grads)[0]["w"])
    np.testing.assert_allclose(step(chain, small), step(free, small))
    np.testing.assert_allclose(step(chain, big), step(free, {"w": jnp.array([0.6, 0.8])}), rtol=1e-5)


def test_lora_plus_learns_b_and_vectors_faster_and_decays_them_so():
    """Each parameter's update is that of a chain with its own learning rate (Hayou et al. 2024)."""
    config = Config(learning_rate=0.1, schedule="linear", weight_decay=0.05, clip=0.5, lora_plus=16.0)
    faster = {"b", "m", "bias", "scale"}
    chains = {
        ratio: optim.build(dataclasses.replace(config, learning_rate=0.1 * ratio, lora_plus=1.0), 6)[0]
        for ratio in (1, 16)
    }
    ours, (tx, rate) = params(), optim.build(config, 6)
    assert float(rate(0)) == np.float32(0.1)  # of A, for the log

    @jax.jit
    def step(tx_state, states, grads, current):
        updates, tx_state = tx.update(grads, tx_state, current)
        found = {ratio: chains[ratio].update(grads, states[ratio], current) for ratio in chains}
        return updates, tx_state, {r: u for r, (u, _) in found.items()}, {r: s for r, (_, s) in found.items()}

    state, states = tx.init(ours), {ratio: chain.init(ours) for ratio, chain in chains.items()}
    for seed in (1, 2, 3):
        updates, state, expected, states = step(state, states, params(seed), ours)
        for path, update in tree.flat(updates).items():
            fast = path.rpartition("/")[2] in faster and path != "lora/embed/b"
            np.testing.assert_allclose(update, tree.flat(expected[16 if fast else 1])[path], rtol=1e-5, err_msg=path)
        ours = jax.tree.map(jnp.add, ours, updates)


def test_lora_plus_without_an_adapter_or_a_ratio_is_refused():
    with pytest.raises(ValueError, match="optim.lora_plus is 0.0; it must be above 0"):
        optim.build(Config(lora_plus=0.0), 3)
    tx, _ = optim.build(Config(lora_plus=16.0), 3)
    with pytest.raises(ValueError, match="optim.lora_plus is for adapters of linear layers, and none trains"):
        tx.init({"params": {"w": jnp.ones(3)}, "lora": {"embed": {"a": jnp.ones((2, 1)), "b": jnp.ones((1, 2))}}})
