import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsft.losses import orpo

from .conftest import softplus

BETA = 0.3


def log_odds(a):
    return a - math.log(1 - math.exp(a))


def bent(a, alpha):
    return (1 - math.exp(a) ** -alpha) / alpha


# (name, options, formula): the likelihood term apart
FORMULAS = [
    ("orpo", {}, lambda p: BETA * softplus(-(log_odds(p.a_c) - log_odds(p.a_r))), 1.0),
    ("sft", {}, lambda p: 0.0, 1.0),
    ("simpo", {}, lambda p: softplus(-(BETA * (p.a_c - p.a_r) - 0.5)), 0.0),
    (
        "simpo",
        {"gamma": 1.2, "label_smoothing": 0.1},
        lambda p: 0.9 * softplus(-(BETA * (p.a_c - p.a_r) - 1.2)) + 0.1 * softplus(BETA * (p.a_c - p.a_r) - 1.2),
        0.0,
    ),
    ("alphapo", {}, lambda p: softplus(-(BETA * (bent(p.a_c, 0.25) - bent(p.a_r, 0.25)) - 0.5)), 0.0),
    ("alphapo", {"alpha": -0.5}, lambda p: softplus(-(BETA * (bent(p.a_c, -0.5) - bent(p.a_r, -0.5)) - 0.5)), 0.0),
    ("alphapo", {"alpha": 0.0}, lambda p: softplus(-(BETA * (p.a_c - p.a_r) - 0.5)), 0.0),
    ("cpo", {}, lambda p: softplus(-BETA * (p.lp_c - p.lp_r)), 1.0),
    (
        "cpo",
        {"label_smoothing": 0.2, "cpo_alpha": 0.4},
        lambda p: 0.8 * softplus(-BETA * (p.lp_c - p.lp_r)) + 0.2 * softplus(BETA * (p.lp_c - p.lp_r)),
        0.4,
    ),
]


@pytest.mark.parametrize(("name", "options", "formula", "weight"), FORMULAS)
def test_a_loss_is_its_formula_for_each_pair_and_the_likelihood_a_mean_over_tokens(
    name, options, formula, weight, draw, one_by_one
):
    pairs = draw(reference=False)
    losses, metrics = getattr(orpo, name)(pairs, beta=BETA, **options)
    apart = np.array(one_by_one(pairs, formula))
    mean_count = float(pairs.chosen_count.sum()) / len(apart)
    expected = apart + weight * np.array(one_by_one(pairs, lambda p: -p.lp_c / mean_count))
    np.testing.assert_allclose(losses, expected, rtol=2e-5)
    tokens, nats = float(pairs.chosen_count.sum()), -float(pairs.chosen.sum())
    assert float(losses.mean()) == pytest.approx(apart.mean() + weight * nats / tokens, rel=1e-5)
    if weight and name != "sft":
        assert float(metrics["nll"].mean()) == pytest.approx(nats / tokens, rel=1e-5)


@pytest.mark.parametrize(
    ("name", "reward"),
    [
        ("orpo", lambda p: BETA * p.a_c),
        ("simpo", lambda p: BETA * p.a_c),
        ("alphapo", lambda p: BETA * bent(p.a_c, 0.25)),
        ("cpo", lambda p: BETA * p.lp_c),
        ("sft", lambda p: BETA * p.c),
    ],
)
def test_rewards_are_what_the_loss_compares(name, reward, draw, one_by_one):
    pairs = draw()
    _, metrics = getattr(orpo, name)(pairs, beta=BETA)
    np.testing.assert_allclose(metrics["rewards_chosen"], one_by_one(pairs, reward), rtol=1e-5)


@pytest.mark.parametrize("name", ["sft", "orpo", "cpo"])
def test_a_step_cut_into_microbatches_is_the_same_with_the_count_of_the_whole(name, draw):
    pairs, loss = draw(8), getattr(orpo, name)
    whole = loss(pairs)[0]
    part = lambda here: type(pairs)(*(x[here] for x in pairs))
    parts = [loss(part(here), mean_count=pairs.chosen_count.mean())[0] for here in (slice(3), slice(3, 8))]
    np.testing.assert_allclose(jnp.concatenate(parts), whole, rtol=1e-6)
    cut = jnp.concatenate([loss(part(here))[0] for here in (slice(3), slice(3, 8))])
    assert float(abs(cut - whole).max()) > 1e-2  # which a count of the microbatch is not


def test_log_odds_are_right_next_to_certainty_and_finite_at_it(draw):
    averages = jnp.array([-1e-6, -1e-4, -0.5, -0.7, -30.0, -1e4, 0.0])
    ones = jnp.ones(7)
    pairs = draw(7)._replace(chosen=averages, rejected=-ones, chosen_count=ones, rejected_count=ones)
    loss = lambda pairs: orpo.orpo(pairs, beta=1.0)[0].sum()
    found = orpo.orpo(pairs)[1]["log_odds"]
    expected = [a - math.log(-math.expm1(a)) - log_odds(-1.0) for a in averages.tolist()[:-1]]
    np.testing.assert_allclose(found[:-1], expected, rtol=1e-6)
    assert 15 < float(found[-1]) < 20
    for swapped in (pairs, pairs._replace(chosen=pairs.rejected, rejected=pairs.chosen)):
        slopes = jax.grad(loss, allow_int=True)(swapped)
        assert all(np.isfinite(slope).all() for slope in slopes[:2])


def test_a_reference_is_not_looked_at(draw):
    pairs = draw()
    for name in ("orpo", "simpo", "alphapo", "cpo"):
        other = pairs._replace(ref_chosen=pairs.ref_rejected, ref_rejected=jnp.full(7, jnp.nan))
        for a, b in zip(
            jax.tree.leaves(getattr(orpo, name)(pairs)), jax.tree.leaves(getattr(orpo, name)(other)), strict=True
        ):
            np.testing.assert_array_equal(a, b)
