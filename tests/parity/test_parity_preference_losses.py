"""Every preference loss, its gradient and its rewards are those of TRL's trainers on the same log-probabilities."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsft import losses
from jaxsft.losses import DIVERGENCES, PREFERENCE, UNPAIRED, Scored, ScoredAnswers, weighted

from . import trl_losses
from .trl_losses import Answers, torch

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
N, T, V, BETA = 6, 9, 13, 0.3
close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6)


def answers(seed: int = 0, rows: int = 2 * N) -> Answers:
    """Random log-probabilities of answers of 1 to T tokens, each behind a prompt of its own length."""
    draw = np.random.default_rng(seed)
    lengths = draw.integers(1, T + 1, rows)
    lengths[:2] = 1, T
    starts = draw.integers(0, T - lengths + 1)
    column = np.arange(T)
    mask = (starts[:, None] <= column) & (column < (starts + lengths)[:, None])
    policy = -draw.exponential(1.0, (rows, T)) - 1e-3
    reference = policy + draw.normal(scale=0.7, size=(rows, T))
    collisions = -draw.exponential(1.0, (rows, T))
    return Answers(*((x * mask).astype(np.float32) for x in (policy, reference, collisions)), mask)


def scored(given: Answers, logprobs, weights=1.0) -> Scored:
    """Sums over the answers, weighed by token."""
    policy, reference, count = (
        (x * weights).sum(axis=1).reshape(2, N) for x in (logprobs, jnp.asarray(given.reference), given.mask)
    )
    count = jnp.asarray(given.mask.sum(axis=1).reshape(2, N), jnp.float32)
    return Scored(*policy, *reference, *count, jnp.ones(N, bool))


def ours(given: Answers, loss, weights=1.0, of_pairs=None):
    """The mean loss, its gradient by token, and the metrics' means."""

    def total(logprobs):
        each, metrics = loss(scored(given, logprobs, weights))
        each = each if of_pairs is None else each * of_pairs(logprobs)
        return each.mean(), {name: value.mean() for name, value in metrics.items()}

    (value, metrics), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(jnp.asarray(given.logprobs))
    return value, gradient * given.mask, metrics


def same(mine, theirs: trl_losses.Result):
    """Loss, gradient and rewards agree, and there is a gradient."""
    value, gradient, metrics = mine
    close(value, theirs.loss)
    close(gradient, theirs.gradient)
    assert np.abs(theirs.gradient).max() > 1e-3
    for side in ("chosen", "rejected"):
        close(metrics[f"rewards_{side}"], theirs.metrics[f"rewards/{side}"])


# name: options here, and those of TRL where they have another name
DPO = {
    "sigmoid": [{}],
    "sigmoid_norm": [{}],
    "hinge": [{}],
    "ipo": [{}],
    "robust": [{}, {"label_smoothing": 0.2}],
    "exo_pair": [{"label_smoothing": 1e-3}, {"label_smoothing": 0.3}],
    "discopop": [{}, {"tau": 0.5}],
    "nca_pair": [{}],
    "bco_pair": [{}],
    "sppo_hard": [{}],
    "apo_zero": [{}],
    "apo_down": [{}],
    "aot": [{}, {"label_smoothing": 0.2}],
    "aot_unpaired": [{}, {"label_smoothing": 0.2}],
    "sft": [{}],
}
BENT = ["sigmoid", "sigmoid_norm", "hinge", "ipo", "robust", "exo_pair", "discopop"]
THEIR_NAMES = {"tau": "discopop_tau", "divergence": "f_divergence_type", "alpha": "f_alpha_divergence_coef"}


def in_trl(options: dict) -> dict:
    return {THEIR_NAMES.get(name, name): value for name, value in options.items()}


def test_every_loss_of_ours_is_compared():
    compared = {*DPO, "orpo", "cpo", "simpo", "alphapo"}
    assert compared == PREFERENCE.keys()
    assert UNPAIRED.keys() == {"kto", "apo_zero_unpaired", "bco"}  # TRL has bco no more: tests/losses/test_kto.py


@pytest.mark.parametrize("beta", [0.1, 0.7])
@pytest.mark.parametrize(("name", "options"), [(name, options) for name, cases in DPO.items() for options in cases])
def test_a_loss_of_the_dpo_trainer(name, options, beta):
    given = answers()
    theirs = trl_losses.dpo(given, loss_types=[name], beta=beta, **in_trl(options))
    same(ours(given, functools.partial(PREFERENCE[name], beta=beta, **options)), theirs)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("name", BENT)
def test_a_divergence(name, divergence, alpha):
    given, options = answers(), {"divergence": divergence, "alpha": alpha, "beta": BETA}
    if "label_smoothing" in DPO[name][-1]:
        options["label_smoothing"] = 0.2
    theirs = trl_losses.dpo(given, loss_types=[name], **in_trl(options))
    same(ours(given, functools.partial(PREFERENCE[name], **options)), theirs)


@pytest.mark.parametrize(
    "terms",
    [{"sigmoid": 1.0, "sft": 0.2}, {"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0}, {"sft": 0.5, "ipo": 2.0, "aot": 1.0}],
)
def test_a_weighted_sum(terms):
    given = answers()
    theirs = trl_losses.dpo(given, loss_types=list(terms), loss_weights=list(terms.values()), beta=BETA)
    same(ours(given, weighted(terms, beta=BETA)), theirs)


# TRL refuses aot with these weights, and cannot derive hinge and sft: it multiplies their losses in place.
@pytest.mark.parametrize("name", [name for name in DPO if name not in ("aot", "aot_unpaired", "hinge", "sft")])
def test_weights_of_wpo(name):
    given, option = answers(), {"label_smoothing": 0.2} if name == "exo_pair" else {}
    theirs = trl_losses.dpo(given, loss_types=[name], beta=BETA, use_weighting=True, **option)

    def weights(logprobs):
        each = losses.wpo(*(jnp.asarray(x).sum(axis=1) for x in (logprobs, given.collisions, given.mask)))
        return each[:N] * each[N:]

    same(ours(given, functools.partial(PREFERENCE[name], beta=BETA, **option), of_pairs=weights), theirs)


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("name", ["sigmoid", "ipo", "apo_zero"])
def test_weights_of_ld_dpo(name, alpha):
    given = answers()
    theirs = trl_losses.dpo(given, loss_types=[name], beta=BETA, ld_alpha=alpha)
    count = given.mask.sum(axis=1)
    shortest = np.tile(np.minimum(count[:N], count[N:]), 2)[:, None]
    weights = losses.ld_weights(jnp.asarray(given.mask.cumsum(axis=1) - 1), jnp.asarray(shortest), alpha)
    same(ours(given, functools.partial(PREFERENCE[name], beta=BETA), weights), theirs)


def test_label_smoothing_of_sigmoid_is_that_of_trl_where_it_has_it():
    """DPOTrainer ignores label_smoothing with sigmoid, and CPOTrainer heeds it: there it is compared."""
    given = answers()
    plain, smooth = (trl_losses.dpo(given, loss_types=["sigmoid"], label_smoothing=eps) for eps in (0.0, 0.2))
    assert plain.loss == smooth.loss
    pairs = scored(given, jnp.asarray(given.logprobs))
    chosen, rejected = np.asarray(pairs.chosen - pairs.ref_chosen), np.asarray(pairs.rejected - pairs.ref_rejected)
    theirs = trl_losses.conservative(chosen, rejected, beta=BETA, label_smoothing=0.2)
    close(PREFERENCE["sigmoid"](pairs, beta=BETA, label_smoothing=0.2)[0], theirs)


@pytest.mark.parametrize("options", [{}, {"desirable_weight": 0.5, "undesirable_weight": 1.3}])
@pytest.mark.parametrize("up", [True, False], ids=["policy above", "policy below"])
@pytest.mark.parametrize("name", ["kto", "apo_zero_unpaired"])
def test_a_loss_of_the_kto_trainer(name, up, options):
    given, other = answers(), answers(seed=1)
    label = np.random.default_rng(0).random(2 * N) < 0.6
    shift = (0.5 if up else -0.5) * other.mask
    other = other._replace(logprobs=other.reference + shift.astype(np.float32))  # so that the mean has that sign
    theirs = trl_losses.kto(given, other, label, loss_type=name, beta=BETA, **options)
    total = lambda x: jnp.asarray(x).sum(axis=1)
    kl = losses.kto_kl(total(other.logprobs), total(other.reference), jnp.ones(2 * N, bool))
    assert (float(kl) > 0) == up

    def loss(logprobs):
        judged = ScoredAnswers(total(logprobs), total(given.reference), jnp.asarray(label), jnp.ones(2 * N, bool))
        each, metrics = UNPAIRED[name](judged, beta=BETA, **{"kl": kl} if name == "kto" else {}, **options)
        return each.mean(), metrics

    (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(jnp.asarray(given.logprobs))
    close(value, theirs.loss)
    close(gradient * given.mask, theirs.gradient)
    if name == "kto":
        close(kl, theirs.metrics["kl"])
    close(metrics["reward_desirable"].sum() / label.sum(), theirs.metrics["rewards/chosen"])
    close(metrics["reward_undesirable"].sum() / (~label).sum(), theirs.metrics["rewards/rejected"])


def written(prompt: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits [2N, T, V], tokens, and which of them are the answers': those behind a prompt, to the end of a row."""
    draw = np.random.default_rng(prompt)
    logits = draw.normal(scale=1.5, size=(2 * N, T, V)).astype(np.float32)
    answer = np.tile(np.arange(T) >= prompt, (2 * N, 1))
    answer[1::3, -2:] = False  # rows of other lengths, padded
    return logits, draw.integers(1, V, (2 * N, T)), answer


def from_logits(loss, logits, tokens, answer):
    """The mean loss, its gradient by the logits, and the metrics' means."""

    def total(logits):
        each = jax.nn.log_softmax(logits[:, :-1])
        lp = jnp.take_along_axis(each, jnp.asarray(tokens[:, 1:, None]), axis=-1)[..., 0]
        sums, counts = ((x * answer[:, 1:]).sum(axis=1).reshape(2, N) for x in (lp, jnp.ones(lp.shape)))
        values, metrics = loss(Scored(*sums, *jnp.zeros((2, N)), *counts, jnp.ones(N, bool)))
        return values.mean(), {name: value.mean() for name, value in metrics.items()}

    (value, metrics), gradient = jax.value_and_grad(total, has_aux=True)(jnp.asarray(logits))
    return value, gradient, metrics


@pytest.mark.parametrize("beta", [0.1, 0.7])
def test_orpo_behind_a_prompt_of_one_token(beta):
    """TRL's likelihood is that of prompt and answer; a prompt of one token has none, as nothing predicts the first."""
    logits, tokens, answer = written(prompt=1)
    answer[1::3, -2:] = True  # nor does it leave out what is no answer
    theirs = trl_losses.orpo(logits, tokens, answer, beta=beta)
    mine = from_logits(functools.partial(PREFERENCE["orpo"], beta=beta), logits, tokens, answer)
    same(mine, theirs)
    close(mine[2]["nll"], theirs.metrics["nll_loss"])
    close(mine[2]["log_odds"], theirs.metrics["log_odds_chosen"])


def test_orpo_but_for_the_likelihood_of_the_prompt():
    logits, tokens, answer = written(prompt=4)
    theirs = trl_losses.orpo(logits, tokens, answer, beta=BETA)
    value, _, metrics = from_logits(functools.partial(PREFERENCE["orpo"], beta=BETA), logits, tokens, answer)
    close(value - metrics["nll"], theirs.loss - theirs.metrics["nll_loss"])
    close(metrics["log_odds"], theirs.metrics["log_odds_chosen"])
    assert abs(float(metrics["nll"]) - theirs.metrics["nll_loss"]) > 1e-2


CPO = {
    "cpo": (functools.partial(PREFERENCE["cpo"], beta=BETA), {}),
    "cpo, smooth": (
        functools.partial(PREFERENCE["cpo"], beta=BETA, label_smoothing=0.2, cpo_alpha=0.4),
        {"label_smoothing": 0.2, "cpo_alpha": 0.4},
    ),
    "simpo": (functools.partial(PREFERENCE["simpo"], beta=BETA), {"loss_type": "simpo", "cpo_alpha": 0.0}),
    "simpo, smooth": (
        functools.partial(PREFERENCE["simpo"], beta=2.0, gamma=1.2, label_smoothing=0.1),
        {"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 1.2, "label_smoothing": 0.1, "beta": 2.0},
    ),
    "simpo with cpo": (
        weighted({"simpo": 1.0, "sft": 0.7}, beta=BETA),
        {"loss_type": "simpo", "cpo_alpha": 0.7},
    ),
    "alphapo": (
        functools.partial(PREFERENCE["alphapo"], beta=BETA),
        {"loss_type": "simpo", "cpo_alpha": 0.0, "alpha": 0.25},
    ),
    "alphapo, the other way": (
        functools.partial(PREFERENCE["alphapo"], beta=2.0, gamma=0.1, alpha=-0.5),
        {"loss_type": "simpo", "cpo_alpha": 0.0, "alpha": -0.5, "simpo_gamma": 0.1, "beta": 2.0},
    ),
    "hinge without reference": (
        functools.partial(PREFERENCE["hinge"], beta=BETA),
        {"loss_type": "hinge", "cpo_alpha": 0.0},
    ),
}


@pytest.mark.parametrize("name", CPO)
def test_a_loss_of_the_cpo_trainer(name):
    loss, options = CPO[name]
    given = written(prompt=3)
    theirs = trl_losses.cpo(*given, **{"beta": BETA} | options)
    same(from_logits(loss, *given), theirs)


def test_ipo_without_reference_is_that_of_the_cpo_trainer_but_for_what_is_called_a_reward():
    given = written(prompt=3)
    theirs = trl_losses.cpo(*given, loss_type="ipo", cpo_alpha=0.0, beta=BETA)
    value, gradient, metrics = from_logits(functools.partial(PREFERENCE["ipo"], beta=BETA), *given)
    close(value, theirs.loss)
    close(gradient, theirs.gradient)
    assert float(metrics["rewards_chosen"]) < theirs.metrics["rewards/chosen"]  # a sum here, as in DPOTrainer


@pytest.mark.parametrize("center", [None, 0.01])
@pytest.mark.parametrize("margin", [False, True])
def test_the_loss_of_the_reward_trainer(margin, center):
    draw = np.random.default_rng(0)
    scores = draw.normal(size=2 * N).astype(np.float32)
    margins = draw.random(N).astype(np.float32) if margin else None
    theirs = trl_losses.reward(scores, margin=margins, center=center)

    def loss(scores):
        given = 0.0 if margins is None else jnp.asarray(margins)
        each, metrics = losses.bradley_terry(scores[:N], scores[N:], margin=given, center=center or 0.0)
        return each.mean(), metrics

    (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(jnp.asarray(scores))
    close(value, theirs.loss)
    close(gradient, theirs.gradient)
    for name, of_trl in (("accuracy", "accuracy"), ("margin", "margin"), ("score", "mean_reward")):
        close(metrics[name].mean(), theirs.metrics[of_trl])


@pytest.mark.parametrize(("scale", "soft_cap"), [(1.0, None), (0.3, 2.0)])
def test_collision_is_what_trl_reads_off_its_output_layer(scale, soft_cap):
    kernels = pytest.importorskip("trl.kernels")
    draw = np.random.default_rng(0)
    features, table = (draw.normal(size=shape).astype(np.float32) for shape in ((2, T, 5), (V, 5)))
    rows, labels = torch.tensor(features.reshape(-1, 5)), torch.zeros(2 * T).long()
    wanted = ("log_probs", "log_sum_sq_probs")
    given = rows, torch.tensor(table), None, labels, 1.0, 64, soft_cap, scale, wanted
    theirs = kernels.ChunkedLogProbFunction.apply(*given)[2].numpy().reshape(2, T)
    close(losses.collision(features, table, jnp.ones((2, T), bool), scale=scale, soft_cap=soft_cap), theirs)
