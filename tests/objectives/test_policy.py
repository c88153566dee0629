"""The objective of PPO, GRPO and their kin: a step's loss, gradients and metrics."""

import functools
import math
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxsft import objectives, sharding, train, tree
from jaxsft.models import DecoderConfig, build
from jaxsft.types import Rollouts

from . import rollouts as rl

CLIPS = {"low": 0.1, "high": 0.2}
PPO = {"bounds": CLIPS, "temperature": 0.7, "entropy_coef": 0.02, "value_coef": 0.3, "value_clip": 0.2}
GRPO = {"aggregate": "sequence", "bounds": CLIPS, "temperature": 0.7, "kl_coef": 0.2}
SHARED = GRPO | {"value_coef": 0.5, "value_clip": 0.2}
HEARD = [n for n in range(rl.EPISODES) if n % 3 != 1]
KINDS = {"ppo": (PPO, "own"), "a mean over episodes": (SHARED, "shared")}


@functools.cache
def batch(fresh: bool = False) -> Rollouts:
    """Episodes of which some are silent, drawn by another policy than the one that learns."""
    tokens, episode = rl.drawn().packed
    found, other = rl.assessed(), rl.assessed(1)
    now = np.zeros(episode.shape, np.float32)
    for number, own in enumerate(rl.logprobs_alone(objectives.policy_of(rl.learner("lora").variables), 0.7)):
        now[(episode == number) & rl.learned(tokens)] = own
    old, reference = now + 0.4 * found.value, now + 0.6 * other.value  # so near that not every ratio is clipped
    tokens = tokens._replace(mask=tokens.mask & np.isin(episode, HEARD))
    advantage, returns = other.old + 1.5, found.value + other.reference
    flags = np.full((len(episode), 1), fresh)
    return Rollouts(*map(jnp.asarray, (*tokens, old, reference, advantage, found.value, returns, flags)))


@functools.cache
def compiled(kind: str, pieces: int, spread: bool):
    """rows -> the gradient and metrics of a step: what SGD with rate 1 takes off."""
    how, critic = KINDS[kind]
    learner, tx, mesh = rl.learner("lora", critic), optax.sgd(1.0), None
    put = lambda rows: rows
    trainable, frozen = learner.trainable, learner.frozen
    if spread:
        mesh = sharding.mesh(2, 2, 1, devices=jax.devices()[:4])
        trainable, frozen = jax.device_put((trainable, frozen), sharding.whole(mesh))
        put = lambda rows: jax.device_put(rows, sharding.rows(mesh))
    begin = lambda: train.init(jax.tree.map(jnp.copy, trainable), tx, jax.random.key(0), mesh)
    shards = sharding.of(begin()) if spread else None
    step = train.make_step(objectives.policy(rl.MODEL, **how), tx, microbatches=pieces, shardings=shards)

    def run(rows: Rollouts):
        state, metrics = step(begin(), frozen, put(rows))
        grads = jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), trainable, state.trainable)
        return tree.flat(grads), {name: float(value) for name, value in metrics.items()}

    return run


def gradient(kind: str, fresh: bool = False, pieces: int = 1, spread: bool = False):
    return compiled(kind, pieces, spread)(batch(fresh))


def by_hand(kind: str) -> dict[str, float]:
    """Loss and metrics from log-probabilities of each episode alone, token by token."""
    how, critic = KINDS[kind]
    rows, variables = batch(), rl.learner("lora", critic).variables
    lp, entropies = (ask(objectives.policy_of(variables), 0.7) for ask in (rl.logprobs_alone, rl.entropies_alone))
    own = variables["value"] if critic == "own" else objectives.policy_of(variables)
    own = {**own, "params": {**rl.base(), **variables["value"]["params"]}}
    values = rl.values_alone(rl.MODEL, own)
    fields = {name: rl.lists(getattr(rows, name)) for name in ("old", "reference", "advantage", "value", "returns")}
    sums, tokens, total = Counter(), 0, 0.0
    for n in HEARD:
        own, start = 0.0, len(rl.drawn().prompts[n]) - 1
        for t, p in enumerate(lp[n]):
            old, reference, advantage, value, wanted = (fields[name][n][t] for name in fields)
            ratio = math.exp(p - old)
            held = min(max(ratio, 1 - CLIPS["low"]), 1 + CLIPS["high"])
            loss = -min(ratio * advantage, held * advantage)
            found = {
                "policy_loss": loss,
                "entropy": entropies[n][t],
                "ratio": ratio,
                "clip_fraction": (ratio > 1 + CLIPS["high"] and advantage > 0)
                or (ratio < 1 - CLIPS["low"] and advantage < 0),
                "drift": (p - old) ** 2 / 2,
                "kl_loss": math.exp(reference - p) - (reference - p) - 1,
            }
            loss += how.get("kl_coef", 0) * found["kl_loss"] - how.get("entropy_coef", 0) * found["entropy"]
            v = values[n][start + t]
            near = min(max(v, value - 0.2), value + 0.2)
            found["value_loss"] = max((v - wanted) ** 2, (near - wanted) ** 2) / 2
            found["value_clip_fraction"] = (near - wanted) ** 2 > (v - wanted) ** 2
            loss += how["value_coef"] * found["value_loss"]
            sums.update({name: float(one) for name, one in found.items()})
            own += loss
            tokens += 1
        total += own if kind == "ppo" else own / len(lp[n])
    told = {name: one / tokens for name, one in sums.items()}
    return told | {"loss": total / (tokens if kind == "ppo" else rl.EPISODES)}  # of which some are silent


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_metrics_are_those_of_a_loop_over_tokens(kind):
    _, told = gradient(kind)
    wanted = by_hand(kind)
    names = {"policy_loss", "entropy", "ratio", "clip_fraction", "drift"}
    names |= {"value_loss", "value_clip_fraction"} | ({"kl_loss"} if kind != "ppo" else set())
    assert set(told) == names | {"loss", "grad_norm", "trained_tokens"}
    for name in (*names, "loss"):
        assert told[name] == pytest.approx(wanted[name], rel=1e-4, abs=2e-5), name
    assert 0.05 < told["clip_fraction"] < 0.95
    assert told["entropy"] >= 0
    assert 0 < told["value_clip_fraction"] < 1


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_and_metrics_do_not_depend_on_microbatches_and_mesh(kind):
    wanted, told = gradient(kind)
    found, said = gradient(kind, pieces=2, spread=True)
    for name, value in told.items():
        assert said[name] == pytest.approx(value, rel=2e-5, abs=2e-6), name
    assert set(found) == set(wanted)
    for path, grad in wanted.items():
        np.testing.assert_allclose(found[path], grad, atol=3e-6, err_msg=path)


@pytest.mark.parametrize("kind", KINDS)
def test_before_anything_is_learned_the_ratio_is_exactly_1_whatever_was_drawn_at(kind):
    _, told = gradient(kind, fresh=True)
    assert told["ratio"] == 1.0
    assert told["clip_fraction"] == told["drift"] == 0.0
    assert gradient(kind)[1]["ratio"] != 1.0


def test_a_fresh_gradient_is_that_of_log_probabilities_times_advantages_and_of_the_entropy():
    """Against jax.grad of whole softmaxes over episodes alone."""
    learner, found = rl.learner("lora", "own"), rl.drawn()
    index = [
        (n, len(found.prompts[n]) - 1 + t, token, advantage)
        for n, advantages in enumerate(rl.lists(batch().advantage))
        for t, (token, advantage) in enumerate(zip(found.answers[n], advantages, strict=True))
        if n in HEARD
    ]
    rows, places, tokens, weights = map(np.array, zip(*index, strict=True))

    def plain(low):
        tables = rl.tables_alone(tree.combine({"lora": low}, objectives.policy_of(learner.frozen)), 0.7)[rows, places]
        lp, entropy = tables[np.arange(len(rows)), tokens], -(jnp.exp(tables) * tables).sum(axis=-1)
        return -(lp * weights + PPO["entropy_coef"] * entropy).mean()

    grads, _ = gradient("ppo", fresh=True)
    for path, grad in tree.flat({"lora": jax.jit(jax.grad(plain))(learner.trainable["lora"])}).items():
        np.testing.assert_allclose(grads[path], grad, atol=3e-6, err_msg=path)


@pytest.mark.parametrize(("kind", "alone"), [("ppo", True), ("a mean over episodes", False)])
def test_the_value_loss_moves_a_critic_of_its_own_alone_and_the_policy_too_where_it_is_shared(kind, alone):
    """Seen by other returns: bit by bit the same gradient is one that the value loss has no part in."""
    one, _ = gradient(kind)
    two, _ = compiled(kind, 1, False)(batch()._replace(returns=batch().returns + 0.5))
    for path, grad in one.items():
        assert (grad == two[path]).all() == (alone and not path.startswith("value/")), path


def test_what_it_cannot_learn_is_refused():
    labelled = build(DecoderConfig(48, 16, 32, 2, heads=4, kv_heads=2, head_dim=4, max_position=64, labels=1))
    with pytest.raises(ValueError, match="scores whole texts"):
        objectives.policy(labelled)
    with pytest.raises(ValueError, match="there is no policy loss 'trpo'"):
        objectives.policy(rl.MODEL, loss="trpo")
    with pytest.raises(ValueError, match="ppo takes no cap"):
        objectives.policy(rl.MODEL, bounds={"cap": 2.0})
