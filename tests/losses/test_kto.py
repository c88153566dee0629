import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsft.losses import UNPAIRED, ScoredAnswers, bco, bco_shift, kto, kto_kl

from .conftest import sigmoid, softplus

BETA = 0.3
GIVEN = {"kto": {"kl": 1.5}, "apo_zero_unpaired": {}, "bco": {"delta": 0.7}}  # besides beta


FORMULAS = {
    "kto": (lambda r: 1 - sigmoid(r - BETA * 1.5), lambda r: 1 - sigmoid(BETA * 1.5 - r)),
    "apo_zero_unpaired": (lambda r: 1 - sigmoid(r), sigmoid),
    "bco": (lambda r: softplus(-(r - 0.7)), lambda r: softplus(r - 0.7)),
}


@pytest.fixture
def answers():
    random = np.random.default_rng(0)
    policy, reference = random.normal(scale=4.0, size=(2, 9)).astype(np.float32)
    label = np.arange(9) % 3 > 0
    return ScoredAnswers(*map(jnp.asarray, (policy, reference, label, np.ones(9, bool))))


def test_every_unpaired_loss_is_here():
    assert UNPAIRED.keys() == FORMULAS.keys()


@pytest.mark.parametrize("name", UNPAIRED)
def test_a_loss_is_its_formula_for_each_answer_by_its_label(name, answers):
    losses, metrics = UNPAIRED[name](answers, beta=BETA, **GIVEN[name])
    wanted, unwanted = FORMULAS[name]
    for i in range(9):
        reward = BETA * (float(answers.answer[i]) - float(answers.ref_answer[i]))
        label = bool(answers.label[i])
        assert float(losses[i]) == pytest.approx((wanted if label else unwanted)(reward), rel=1e-5)
        assert float(metrics["reward"][i]) == pytest.approx(reward, rel=1e-5)
        assert float(metrics["reward_desirable"][i]) == pytest.approx(reward if label else 0, rel=1e-5)
        assert float(metrics["reward_undesirable"][i]) == pytest.approx(0 if label else reward, rel=1e-5)


@pytest.mark.parametrize("name", ["kto", "apo_zero_unpaired"])
def test_weights_are_those_of_the_labels(name, answers):
    plain = UNPAIRED[name](answers, **GIVEN[name])[0]
    weighted = UNPAIRED[name](answers, desirable_weight=0.5, undesirable_weight=3.0, **GIVEN[name])[0]
    np.testing.assert_allclose(weighted, plain * np.where(answers.label, 0.5, 3.0), rtol=1e-6)


@pytest.mark.parametrize("name", UNPAIRED)
def test_what_only_fills_up_a_batch_has_no_loss_metric_or_gradient(name, answers):
    exists = jnp.arange(9) < 6
    bad = answers._replace(answer=jnp.where(exists, answers.answer, jnp.nan), exists=exists)
    loss = lambda answers: UNPAIRED[name](answers, beta=BETA, **GIVEN[name])
    (losses, metrics), whole = loss(bad), loss(answers)
    slope = jax.grad(lambda x: loss(bad._replace(answer=x))[0].sum())(bad.answer)
    for array in (losses, slope, *metrics.values()):
        assert (np.asarray(array)[6:] == 0).all()
    np.testing.assert_array_equal(losses[:6], whole[0][:6])


@pytest.mark.parametrize("name", UNPAIRED)
def test_the_gradient_raises_wanted_answers_and_lowers_others_where_policy_and_reference_agree(name, answers):
    same = answers._replace(ref_answer=answers.answer)
    given = {"kto": {"kl": 0.0}, "bco": {"delta": 0.0}}.get(name, {})
    slope = jax.grad(lambda x: UNPAIRED[name](same._replace(answer=x), **given)[0].sum())(same.answer)
    assert (np.sign(slope) == np.where(answers.label, -1, 1)).all()


@pytest.mark.parametrize("name", UNPAIRED)
def test_far_log_ratios_have_finite_losses_and_gradients(name, answers):
    far = answers._replace(answer=jnp.linspace(-1e5, 1e5, 9))
    losses, slope = jax.value_and_grad(lambda x: UNPAIRED[name](far._replace(answer=x), **GIVEN[name])[0].sum())(
        far.answer
    )
    assert np.isfinite(losses)
    assert np.isfinite(slope).all()


def test_kl_is_the_mean_over_what_exists_and_never_negative():
    policy, reference = jnp.array([3.0, 1.0, jnp.nan]), jnp.array([1.0, 0.0, 5.0])
    exists = jnp.array([True, True, False])
    assert float(kto_kl(policy, reference, exists)) == 1.5
    assert float(kto_kl(reference, policy, exists)) == 0.0
    assert float(kto_kl(policy, reference, ~exists & False)) == 0.0


def test_the_points_of_reference_have_no_gradient(answers):
    def total(x):
        moved = answers._replace(answer=x)
        kl = kto_kl(x, answers.ref_answer - 9, answers.exists)
        return (kto(moved, kl=kl)[0] + bco(moved, delta=bco_shift(moved))[0]).sum()

    fixed = kto_kl(answers.answer, answers.ref_answer - 9, answers.exists), bco_shift(answers)
    apart = lambda x: (
        kto(answers._replace(answer=x), kl=fixed[0])[0] + bco(answers._replace(answer=x), delta=fixed[1])[0]
    )
    assert float(fixed[0]) > 1
    np.testing.assert_allclose(
        jax.grad(total)(answers.answer), jax.grad(lambda x: apart(x).sum())(answers.answer), rtol=1e-6
    )


def test_the_shift_is_the_mean_reward_of_what_exists(answers):
    exists = jnp.arange(9) < 4
    bad = answers._replace(answer=jnp.where(exists, answers.answer, jnp.nan), exists=exists)
    rewards = [BETA * (float(answers.answer[i]) - float(answers.ref_answer[i])) for i in range(4)]
    assert float(bco_shift(bad, beta=BETA)) == pytest.approx(sum(rewards) / 4, rel=1e-5)


def test_bco_has_the_numbers_of_the_first_step_of_trls_trainer():
    """As BCOTrainer.bco_loss of TRL 1.10 computes them; TRL 1.16 has no such trainer."""
    policy, reference = jnp.array([1.5, -2.0, 0.25, -4.0, 3.0]), jnp.array([0.5, -1.0, 2.25, -9.0, 0.0])
    label = jnp.array([True, True, False, True, False])

    def loss(policy):
        answers = ScoredAnswers(policy, reference, label, jnp.ones(5, bool))
        delta = bco_shift(answers, beta=0.3)
        return bco(answers, delta=delta, beta=0.3)[0].mean(), delta

    (value, delta), slope = jax.value_and_grad(loss, has_aux=True)(policy)
    assert float(delta) == pytest.approx(0.36, rel=1e-6)
    assert float(value) == pytest.approx(0.6802137494, rel=1e-6)
    expected = [-0.0308997333, -0.0395556241, 0.0166126937, -0.0145392232, 0.0379087478]
    np.testing.assert_allclose(slope, expected, rtol=1e-6)
