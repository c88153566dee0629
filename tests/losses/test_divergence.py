import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsft.losses import DIVERGENCES
from jaxsft.losses.divergence import score

# f of the paper's table 1, in the ratio t; its derivative is the score, up to a constant.
GENERATORS = {
    "reverse_kl": lambda t, a: t * math.log(t),
    "forward_kl": lambda t, a: -math.log(t),
    "js_divergence": lambda t, a: t * math.log(t) - (t + 1) * math.log((t + 1) / 2),
    "alpha_divergence": lambda t, a: (t**a - a * t - (1 - a)) / (a * (a - 1)),
}


@pytest.mark.parametrize("alpha", [0.3, 0.5, 2.0])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_score_is_the_derivative_of_the_generator_up_to_a_constant(name, alpha):
    generator, step = GENERATORS[name], 1e-6
    slope = lambda t: (generator(t * (1 + step), alpha) - generator(t * (1 - step), alpha)) / (2 * step * t)
    ratios = np.linspace(-3, 3, 13)
    found = score(jnp.asarray(ratios, jnp.float32), name, alpha)
    np.testing.assert_allclose(found, [slope(math.exp(u)) - slope(1.0) for u in ratios], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_every_score_is_zero_with_slope_one_where_policy_and_reference_agree(name):
    value, slope = jax.value_and_grad(score)(jnp.float32(0), name, 0.5)
    assert float(value) == pytest.approx(0, abs=1e-7)
    assert float(slope) == pytest.approx({"js_divergence": 0.5}.get(name, 1.0))


def test_an_alpha_of_one_is_reverse_kl():
    ratios = jnp.linspace(-3, 3, 5)
    np.testing.assert_array_equal(score(ratios, "alpha_divergence", 1.0), ratios)
    np.testing.assert_allclose(score(ratios, "alpha_divergence", 1.0001), ratios, rtol=1e-3)


@pytest.mark.parametrize("alpha", [0.5, 3.0])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_far_ratios_have_finite_scores_and_slopes(name, alpha):
    ratios = jnp.array([-1e4, -200.0, 200.0, 1e4])
    assert np.isfinite(score(ratios, name, alpha)).all()
    assert np.isfinite(jax.grad(lambda u: score(u, name, alpha).sum())(ratios)).all()


def test_an_unknown_divergence_lists_the_known():
    with pytest.raises(ValueError, match="divergence is kl; it must be one of reverse_kl, forward_kl, js_div"):
        score(jnp.zeros(1), "kl", 0.5)
