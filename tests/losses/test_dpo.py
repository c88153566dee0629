import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsft.losses import DIVERGENCES, dpo
from jaxsft.losses.divergence import score

from .conftest import sigmoid, softplus

BETA = 0.3


def exo(x, eps):
    return sigmoid(x) * (-softplus(-x) - math.log(1 - eps)) + sigmoid(-x) * (-softplus(x) - math.log(eps))


def found_by_a_model(x, tau):
    return sigmoid(-x / tau) * softplus(-x) + math.exp(-softplus(-x / tau) - x)


# name: [(options, the loss of a pair with log-ratios c and r)]
FORMULAS = {
    "sigmoid": [
        ({}, lambda p: softplus(-BETA * (p.c - p.r))),
        (
            {"label_smoothing": 0.2},
            lambda p: 0.8 * softplus(-BETA * (p.c - p.r)) + 0.2 * softplus(BETA * (p.c - p.r)),
        ),
    ],
    "sigmoid_norm": [({}, lambda p: softplus(-BETA * (p.c / p.n_c - p.r / p.n_r)))],
    "hinge": [({}, lambda p: max(0.0, 1 - BETA * (p.c - p.r)))],
    "ipo": [({}, lambda p: (p.c / p.n_c - p.r / p.n_r - 1 / (2 * BETA)) ** 2)],
    "robust": [
        ({}, lambda p: softplus(-BETA * (p.c - p.r))),
        (
            {"label_smoothing": 0.2},
            lambda p: (0.8 * softplus(-BETA * (p.c - p.r)) - 0.2 * softplus(BETA * (p.c - p.r))) / 0.6,
        ),
    ],
    "exo_pair": [
        ({}, lambda p: exo(BETA * (p.c - p.r), 1e-3)),
        ({"label_smoothing": 0.3}, lambda p: exo(BETA * (p.c - p.r), 0.3)),
    ],
    "discopop": [
        ({}, lambda p: found_by_a_model(BETA * (p.c - p.r), 0.05)),
        ({"tau": 0.8}, lambda p: found_by_a_model(BETA * (p.c - p.r), 0.8)),
    ],
}
CASES = [pytest.param(name, *case, id=f"{name} {case[0]}") for name, cases in FORMULAS.items() for case in cases]


@pytest.mark.parametrize(("name", "options", "formula"), CASES)
def test_a_loss_is_its_formula_for_each_pair(name, options, formula, draw, one_by_one):
    pairs = draw()
    losses, metrics = getattr(dpo, name)(pairs, beta=BETA, **options)
    np.testing.assert_allclose(losses, one_by_one(pairs, formula), rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(metrics["rewards_chosen"], one_by_one(pairs, lambda p: BETA * p.c), rtol=1e-6)
    np.testing.assert_allclose(metrics["rewards_rejected"], one_by_one(pairs, lambda p: BETA * p.r), rtol=1e-6)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("name", FORMULAS)
def test_a_divergence_changes_the_scores_and_leaves_the_rewards(name, divergence, draw, one_by_one):
    pairs, option = draw(), {"divergence": divergence, "alpha": 0.7}
    losses, metrics = getattr(dpo, name)(pairs, beta=BETA, **option)
    bent = lambda u: float(score(jnp.float32(u), divergence, 0.7))

    def formula(pair):
        pair.c, pair.r = bent(pair.c), bent(pair.r)
        return FORMULAS[name][0][1](pair)

    np.testing.assert_allclose(losses, one_by_one(pairs, formula), rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(metrics["rewards_chosen"], one_by_one(pairs, lambda p: BETA * p.c), rtol=1e-6)


@pytest.mark.parametrize("name", ["sigmoid", "robust"])
def test_where_policy_and_reference_agree_the_loss_is_log_2_to_the_last_bit(name, draw):
    pairs = draw()
    pairs = pairs._replace(ref_chosen=pairs.chosen, ref_rejected=pairs.rejected)
    for divergence in DIVERGENCES:
        losses, _ = jax.jit(lambda pairs, d=divergence: getattr(dpo, name)(pairs, divergence=d))(pairs)
        assert (np.asarray(losses) == np.float32(math.log(2))).all()


@pytest.mark.parametrize("eps", [-0.1, 0.5, 1.0])
def test_robust_refuses_labels_of_which_half_are_wrong(eps, draw):
    with pytest.raises(ValueError, match=f"label_smoothing is {eps}; robust takes"):
        dpo.robust(draw(), label_smoothing=eps)


@pytest.mark.parametrize("eps", [0.0, 1.0])
def test_exo_refuses_a_label_that_is_certain(eps, draw):
    with pytest.raises(ValueError, match=f"label_smoothing is {eps}; exo_pair takes the logarithm"):
        dpo.exo_pair(draw(), label_smoothing=eps)


def test_robust_is_the_mean_of_dpo_over_flipped_labels(draw):
    pairs, eps = draw(), 0.15
    flipped = pairs._replace(
        chosen=pairs.rejected, rejected=pairs.chosen, ref_chosen=pairs.ref_rejected, ref_rejected=pairs.ref_chosen
    )
    robust = lambda pairs: dpo.robust(pairs, beta=BETA, label_smoothing=eps)[0]
    mean = (1 - eps) * robust(pairs) + eps * robust(flipped)
    np.testing.assert_allclose(mean, dpo.sigmoid(pairs, beta=BETA)[0], rtol=1e-5, atol=1e-6)


def test_discopop_rises_around_zero_as_the_paper_says(draw):
    ones = jnp.ones(5)
    gaps = jnp.array([-5.0, -1.0, 0.0, 1.0, 5.0])
    pairs = draw(5)._replace(rejected=0 * ones, ref_chosen=0 * ones, ref_rejected=0 * ones)
    slope = jax.grad(lambda x: dpo.discopop(pairs._replace(chosen=x), beta=0.1)[0].sum())(gaps)
    assert np.sign(slope).tolist() == [-1, 1, 1, -1, -1]
