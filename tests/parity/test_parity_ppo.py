"""PPO is that of TRL 1.10, the last that has it: rewards, advantages, returns, both losses and their gradients."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsft import losses

from .trl_ppo_reference import CASES, DEFAULTS, T, draw

pytestmark = pytest.mark.parity
THEIRS = json.loads(Path(__file__).with_name("trl_ppo.json").read_text(encoding="utf-8"))
close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("name", CASES)
def test_a_rollout_and_an_update_are_those_of_trl(name):
    """TRL scores the state behind an answer's last token, where there is room for one, and learns its value.

    So its rewards and values have one position more than its tokens; with that mask ours are the same. Where every
    answer fills its row there is no such position, and nothing to be said about it.
    """
    options = DEFAULTS | CASES[name]
    given = {key: jnp.asarray(x) for key, x in draw(options["full"]).items()}
    at = jnp.arange(T)
    mask, states = at < given["lengths"][:, None], at <= given["lengths"][:, None]
    hide = lambda x: jnp.where(states, x, jnp.nan)

    kl = losses.kl(given["logprobs"], given["ref_logprobs"], mask, estimator=options["kl_estimator"])
    rewards = jnp.where(losses.last(states), given["scores"][:, None], 0.0) - options["kl_coef"] * kl
    if options["whiten_rewards"]:
        rewards = losses.whiten(hide(rewards), states, keep_mean=True)
    values = hide(given["values"])
    advantages, returns = losses.gae(rewards, values, states, gamma=options["gamma"], lam=options["lam"])
    advantages = losses.whiten(advantages, mask)

    def loss(logprobs, vpred):
        policy = losses.ppo(
            logprobs, given["logprobs"], advantages, mask, low=options["cliprange"], high=options["cliprange"]
        )
        value = losses.clipped_value(vpred, values, returns, states, clip=options["cliprange_value"])
        found = {"pg_loss": policy.loss.sum() / mask.sum(), "vf_loss": value.loss.sum() / states.sum()}
        found["vf_clipfrac"] = value.clipped.sum() / states.sum()
        return found["pg_loss"] + options["vf_coef"] * found["vf_loss"], found

    learn = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
    (total, found), (of_policy, of_value) = learn(given["new_logprobs"], hide(given["vpred"]))
    found |= {"rewards": rewards, "advantages": advantages, "returns": returns, "loss": total}
    found |= {"pg_gradient": of_policy, "vf_gradient": of_value}
    assert found.keys() == THEIRS[name].keys()
    for key, expected in THEIRS[name].items():
        close(found[key], expected, err_msg=key)
    assert np.abs(THEIRS[name]["pg_gradient"]).max() > 1e-3


def test_the_stored_numbers_are_of_these_cases():
    assert THEIRS.keys() == CASES.keys()
