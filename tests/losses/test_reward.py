import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsft.losses import bradley_terry

from .conftest import softplus


@pytest.mark.parametrize("center", [0.0, 0.01])
@pytest.mark.parametrize("margins", [0.0, 0.5, [0.0, 1.0, 2.0, 0.5]])
def test_a_loss_is_its_formula_for_each_pair(margins, center):
    chosen, rejected = jnp.array([1.0, -2.0, 0.5, 3.0]), jnp.array([0.0, 1.0, 0.5, -300.0])
    margin = jnp.asarray(margins)
    losses, metrics = bradley_terry(chosen, rejected, margin=margin if margin.ndim else margins, center=center)
    for i in range(4):
        c, r, m = float(chosen[i]), float(rejected[i]), float(jnp.broadcast_to(margin, 4)[i])
        assert float(losses[i]) == pytest.approx(softplus(-(c - r - m)) + center * (c + r) ** 2, rel=1e-6, abs=1e-7)
        assert float(metrics["margin"][i]) == c - r
        assert float(metrics["score"][i]) == (c + r) / 2
    assert metrics["accuracy"].tolist() == [1, 0, 0, 1]
    assert metrics["score_chosen"].tolist() == chosen.tolist()
    assert metrics["score_rejected"].tolist() == rejected.tolist()


def test_what_only_fills_up_a_batch_has_no_loss_metric_or_gradient():
    exists = jnp.array([True, False])
    chosen, rejected = jnp.array([1.0, jnp.nan]), jnp.array([0.0, jnp.inf])
    loss = lambda chosen: bradley_terry(chosen, rejected, margin=jnp.array([0.0, jnp.nan]), center=0.1, exists=exists)
    losses, metrics = loss(chosen)
    for array in (losses, jax.grad(lambda x: loss(x)[0].sum())(chosen), *metrics.values()):
        assert float(array[1]) == 0
        assert np.isfinite(array[0])


def test_far_scores_have_finite_losses_and_gradients():
    far = jnp.array([-1e5, 1e5])
    loss, slope = jax.value_and_grad(lambda x: bradley_terry(x, -x, center=0.01)[0].sum())(far)
    assert np.isfinite(loss)
    assert np.isfinite(slope).all()
