import numpy as np
import pytest

from jaxsft.losses import absolute

from .conftest import sigmoid, softplus

BETA = 0.3


FORMULAS = {
    "nca_pair": lambda p: softplus(-BETA * p.c) + 0.5 * softplus(BETA * p.c) + 0.5 * softplus(BETA * p.r),
    "bco_pair": lambda p: softplus(-BETA * p.c) + softplus(BETA * p.r),
    "sppo_hard": lambda p: (p.c - 1 / (2 * BETA)) ** 2 + (p.r + 1 / (2 * BETA)) ** 2,
    "apo_zero": lambda p: 1 - sigmoid(BETA * p.c) + sigmoid(BETA * p.r),
    "apo_down": lambda p: sigmoid(BETA * p.c) + 1 - sigmoid(BETA * (p.c - p.r)),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_a_loss_is_its_formula_for_each_pair(name, draw, one_by_one):
    pairs = draw()
    losses, metrics = getattr(absolute, name)(pairs, beta=BETA)
    np.testing.assert_allclose(losses, one_by_one(pairs, FORMULAS[name]), rtol=1e-5)
    np.testing.assert_allclose(metrics["rewards_chosen"], one_by_one(pairs, lambda p: BETA * p.c), rtol=1e-6)
    np.testing.assert_allclose(metrics["rewards_rejected"], one_by_one(pairs, lambda p: BETA * p.r), rtol=1e-6)
