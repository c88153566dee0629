"""Advantages, policy losses and their gradients are those of TRL's GRPO and RLOO trainers on the same rollout."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsft import losses
from jaxsft.losses import LOSS_TYPES, POLICY

from . import trl_policy
from .trl_policy import Rollout

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
GROUPS, N, T = 4, 4, 8
NAN = float("nan")
REWARDS = [[1.0, 0.0, 0.5, 2.0], [0.0, NAN, 1.0, 1.0], [0.1, 0.1, 0.1, 0.1], [NAN, NAN, 3.0, NAN]]
close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-6)


def rollout(seed: int = 0, spread: float = 0.3) -> Rollout:
    """Four groups of four: plain, with an answer that has no reward, of equal rewards, of a single reward."""
    draw = np.random.default_rng(seed)
    lengths = draw.integers(1, T + 1, GROUPS * N)
    lengths[:2] = 1, T
    old = -draw.exponential(size=(GROUPS * N, T))
    now, reference = (old + draw.normal(scale=spread, size=old.shape) for _ in range(2))
    ended = draw.random(GROUPS * N) < 0.7
    numbers = (x.astype(np.float32) for x in (now, old, reference, draw.exponential(size=old.shape)))
    return Rollout(*numbers, lengths, ended, np.array(REWARDS, np.float32).ravel(), N)


def packed(x: np.ndarray, fill: float = np.nan) -> jnp.ndarray:
    """Two answers in a row, with a prompt's token before each of them and padding behind."""
    filled = np.full((GROUPS * N // 2, 2 * (T + 2) + 1), fill, x.dtype)
    filled[:, 1 : T + 1], filled[:, T + 3 : 2 * T + 3] = x[::2], x[1::2]
    return jnp.asarray(filled)


def ours(given: Rollout, kind: str, advantages, *, mask=None, beta=0.0, corrected=False, **options):
    """The step's loss, its gradient [N, T], the share of clipped tokens and the mean KL."""
    policy, aggregate = LOSS_TYPES[kind]
    mask = given.mask if mask is None else mask
    learned = packed(mask, False)
    segments = packed(np.tile([[1], [2]], (GROUPS * N // 2, T)), 0)
    segments = segments.at[:, 0].set(1).at[:, T + 2].set(2)
    put = lambda x: packed(np.broadcast_to(x, mask.shape))
    old, each = put(given.old), put(np.asarray(advantages)[:, None])

    def total(logprobs):
        rows = put_back(logprobs)
        found = POLICY[policy](rows, old, each, learned, segments, **options)
        kl = losses.kl(rows, put(given.reference), learned, estimator="k3")
        kl = kl * found.ratio if corrected else kl
        weights, weight = losses.aggregate(aggregate, learned, segments, max_new_tokens=T)
        count = learned.sum()
        told = found.clipped.sum() / count, kl.sum() / count
        return ((found.loss + beta * kl) * weights).sum() / weight, told

    def put_back(logprobs):
        blank = jnp.full((GROUPS * N // 2, 2 * (T + 2) + 1), jnp.nan)
        return blank.at[:, 1 : T + 1].set(logprobs[::2]).at[:, T + 3 : 2 * T + 3].set(logprobs[1::2])

    (value, told), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(jnp.asarray(given.logprobs))
    return value, gradient, *told


def group(given: Rollout, scale="group"):
    return losses.group(jnp.asarray(given.rewards).reshape(-1, N), scale=scale).ravel()


GRPO = {"loss_type": "grpo"}
# loss type and options here, and TRL's
CASES = [
    ("grpo", {}, GRPO),
    ("grpo", {"high": 0.28}, {"epsilon_high": 0.28}),
    ("grpo", {"low": 0.05, "high": 0.1, "delta": 1.3}, {"epsilon_low": 0.05, "epsilon_high": 0.1, "delta": 1.3}),
    ("grpo", {"beta": 0.1}, {"beta": 0.1}),
    ("grpo", {"beta": 0.1, "corrected": True}, {"beta": 0.1, "use_bias_correction_kl": True}),
    ("dr_grpo", {"beta": 0.04}, {"loss_type": "dr_grpo", "beta": 0.04}),
    ("dapo", {"high": 0.28, "beta": 0.1}, {"loss_type": "dapo", "epsilon_high": 0.28, "beta": 0.1}),
    ("bnpo", {}, {"loss_type": "bnpo"}),
    ("cispo", {"cap": 1.2}, {"loss_type": "cispo", "epsilon_high": 1.2}),
    ("cispo", {"beta": 0.1}, {"loss_type": "cispo", "epsilon_high": 5.0, "beta": 0.1}),
    ("gspo", {}, {"importance_sampling_level": "sequence", "epsilon_low": 3e-4, "epsilon_high": 4e-4}),
    (
        "gspo",
        {"low": 0.1, "high": 0.1, "delta": 1.2, "beta": 0.1, "corrected": True},
        {
            "importance_sampling_level": "sequence",
            "epsilon_low": 0.1,
            "epsilon_high": 0.1,
            "delta": 1.2,
            "beta": 0.1,
            "use_bias_correction_kl": True,
        },
    ),
]


def same(mine, theirs: trl_policy.Learned, mask):
    value, gradient, *_ = mine
    close(value, theirs.loss)
    close(gradient, theirs.gradient * mask)
    assert np.abs(theirs.gradient).max() > 1e-3


@pytest.mark.parametrize(
    ("kind", "options", "theirs", "microbatches"),
    [(*case, m) for case in CASES for m in (1, 2) if (case[0], m) != ("bnpo", 2)],  # see the next test
)
def test_a_loss_of_the_grpo_trainer(kind, options, theirs, microbatches):
    """Of a step that is cut in two, TRL adds up what it makes of the halves; ours is that of the whole."""
    given = rollout()
    found = trl_policy.grpo(given, microbatches=microbatches, **theirs)
    mine = ours(given, kind, group(given), **options)
    close(group(given), found.advantages)
    same(mine, found, given.mask)
    if options.get("beta"):
        assert microbatches > 1 or float(mine[3]) == pytest.approx(found.metrics["kl"], rel=1e-5)
    if kind not in ("cispo", "gspo") and microbatches == 1:
        assert float(mine[2]) == pytest.approx(found.metrics["clip_ratio/region_mean"], rel=1e-5)
        assert float(mine[2]) > 0


def test_bnpo_over_microbatches_depends_in_trl_on_how_a_step_is_cut_and_here_it_does_not():
    given = rollout()
    whole, cut = (trl_policy.grpo(given, microbatches=m, loss_type="bnpo").loss for m in (1, 2))
    assert abs(whole - cut) > 1e-3
    close(ours(given, "bnpo", group(given))[0], whole)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_of_the_grpo_trainer(scale):
    given = rollout()
    theirs = trl_policy.grpo(given, scale_rewards=scale)
    close(group(given, scale), theirs.advantages)
    equal = np.asarray(group(given, scale)).reshape(GROUPS, N)[2]
    assert not equal.any()
    same(ours(given, "grpo", group(given, scale)), theirs, given.mask)


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "dapo"])
def test_answers_that_were_cut_off_are_masked_and_still_count_as_answers(kind):
    given = rollout()
    assert 0 < given.ended.sum() < GROUPS * N
    theirs = trl_policy.grpo(given, loss_type=kind, mask_truncated_completions=True, beta=0.1)
    mask = given.mask & given.ended[:, None]
    same(ours(given, kind, group(given), mask=mask, beta=0.1), theirs, mask)


def test_a_group_of_equal_rewards_has_no_gradient():
    given = rollout()
    given = given._replace(rewards=np.full(GROUPS * N, 0.1, np.float32))
    value, gradient, *_ = ours(given, "grpo", group(given))
    assert float(value) == 0
    assert not np.asarray(gradient).any()
    close(trl_policy.grpo(given).gradient, np.zeros((GROUPS * N, T)))


@pytest.mark.parametrize(
    ("options", "theirs"),
    [
        ({}, {}),
        ({"high": 0.5}, {"epsilon_high": 0.5}),
        ({"beta": 0.05}, {"beta": 0.05}),
        ({"normalise": True}, {"normalize_advantages": True}),
        ({"clip": (0.2, 1.5)}, {"reward_clip_range": (0.2, 1.5)}),
        ({"masked": True, "beta": 0.05}, {"mask_truncated_completions": True, "beta": 0.05}),
    ],
)
def test_the_loss_of_the_rloo_trainer(options, theirs):
    """The KL divergence of the policy that drew an answer, k1 summed over it, is taken from its reward.

    An answer whose every token is masked has ratio 1 in TRL, and adds its advantage to the loss: a number without a
    gradient, which ours leaves out.
    """
    given, options = rollout(), dict(options)
    found = trl_policy.rloo(given, **theirs)
    mask = given.mask & (given.ended[:, None] | (not options.pop("masked", False)))
    rewards = jnp.asarray(given.rewards)
    if "clip" in options:
        rewards = jnp.clip(rewards, *options.pop("clip"))
    kl = losses.kl(jnp.asarray(given.old), jnp.asarray(given.reference), jnp.asarray(mask), estimator="k1")
    rewards = rewards - options.pop("beta", 0.0) * kl.sum(axis=1)
    advantages = losses.leave_one_out(rewards.reshape(-1, N), normalise=options.pop("normalise", False)).ravel()
    close(advantages, found.advantages, atol=2e-6)
    constant = -np.asarray(advantages)[~mask.any(axis=1)].sum() / len(mask)
    same(ours(given, "rloo", advantages, mask=mask, **options), found._replace(loss=found.loss - constant), mask)
