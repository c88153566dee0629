"""Objectives over pairs: a model of two layers, its adapter, and pairs of random tokens."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxsft import data, lora, losses, objectives, sharding, train, tree
from jaxsft.models import DecoderConfig, build
from jaxsft.types import Pairs, Tokens

CONFIG = DecoderConfig(48, 16, 32, 2, heads=4, kv_heads=2, head_dim=4, max_position=64, tied=True)
LN2 = np.log(np.float32(2), dtype=np.float32)
LENGTH, PAIRS = 64, 12


def made(seed: int = 0) -> list[tuple[data.Example, data.Example]]:
    """Pairs with prompts of 2 to 5 tokens and answers of 1 to 7."""
    draw = np.random.default_rng(seed)
    found = []
    for _ in range(PAIRS):
        prompt = draw.integers(3, 48, draw.integers(2, 6))
        sides = [np.r_[prompt, draw.integers(3, 48, draw.integers(1, 8))].astype(np.int32) for _ in range(2)]
        found.append(tuple(data.Example(ids, np.arange(len(ids)) >= len(prompt)) for ids in sides))
    return found


PLAN = [[0, 1, 2], [3], [4, 5], [6], [7, 8], [9], [10], [11]]


@pytest.fixture(scope="module")
def batch() -> Pairs:
    values = (np.arange(PAIRS) % 3 == 0).astype(np.float32)
    rows = data.pairs_in_memory(made(), LENGTH, PLAN, values=values)
    return Pairs(*(jnp.stack(part) for part in zip(*rows, strict=True)))


@pytest.fixture(scope="module")
def model():
    return build(CONFIG)


@pytest.fixture(scope="module")
def base(model):
    params = model.init(jax.random.key(0))
    return {"params": jax.tree.map(lambda x: 3 * x if x.ndim > 2 else x, params)}  # so that answers differ


@pytest.fixture(scope="module")
def adapted(base):
    """The variables with a fresh adapter, split by what learns."""
    spec = lora.LoRA(rank=2, alpha=4)
    variables = {**base, "lora": lora.init(jax.random.key(1), base["params"], spec)}
    return tree.partition(variables, lora.TRAINABLE)


@pytest.fixture(scope="module")
def moved(adapted):
    """The same, after the adapter has learned something."""
    trainable, frozen = adapted
    shaken = jax.tree.map(lambda x: x + 0.2 * jax.random.normal(jax.random.key(x.size), x.shape), trainable)
    return shaken, frozen


@pytest.fixture(scope="module")
def alone(model):
    """(variables, example) -> the log-probability of an answer, from a document that stands alone."""
    loss = jax.jit(lambda variables, tokens: objectives.supervised(model)(variables, tokens, None).loss)

    def measure(variables, example: data.Example) -> float:
        tokens = data.in_memory([example], 16)[0]
        return -float(loss(variables, Tokens(*(jnp.asarray(part)[None] for part in tokens))))

    return measure


def test_log_probabilities_of_packed_answers_are_those_of_documents_alone(model, base, batch, alone):
    found = objectives.preference(model, {"simpo": 1.0}).each(base, batch)
    for number, (chosen, rejected) in enumerate(made()):
        row, k = next((r, line.index(number)) for r, line in enumerate(PLAN) if number in line)
        for name, example in (("logps_chosen", chosen), ("logps_rejected", rejected)):
            assert float(found[name][row, k]) == pytest.approx(alone(base, example), abs=2e-5)
    assert found["logps_chosen"][1, 1:].tolist() == [0.0, 0.0]


def test_with_a_fresh_adapter_the_loss_is_exactly_log_2_and_every_reward_is_0(model, adapted, batch):
    pairwise = objectives.preference(model, {"sigmoid": 1.0}, beta=0.3)
    grad = jax.jit(jax.value_and_grad(lambda t: pairwise.objective(tree.combine(t, adapted[1]), batch, None).loss))
    found = jax.jit(pairwise.each)(tree.combine(*adapted), batch)
    exists = np.asarray(batch.exists)
    assert (np.asarray(found["loss"])[exists] == LN2).all()
    for name in ("rewards_chosen", "rewards_rejected", "margin", "kl"):
        assert not np.asarray(found[name]).any(), name
    assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(grad(adapted[0])[1]))


def test_a_step_raises_chosen_answers_and_lowers_rejected_ones(model, adapted, batch):
    trainable, frozen = adapted
    pairwise = objectives.preference(model, {"sigmoid": 1.0})
    each = jax.jit(lambda t: pairwise.each(tree.combine(t, frozen), batch))
    grads = jax.grad(lambda t: pairwise.objective(tree.combine(t, frozen), batch, None).loss)(trainable)
    after = each(jax.tree.map(lambda x, g: x - 0.05 * g, trainable, grads))
    exists = np.asarray(batch.exists)
    assert np.mean(after["rewards_chosen"][exists]) > 0 > np.mean(after["rewards_rejected"][exists])
    assert np.mean(after["margin"][exists] > 0) > 0.8


KINDS = {
    "sigmoid and sft": functools.partial(objectives.preference, terms={"sigmoid": 1.0, "sft": 0.5}),
    "aot": functools.partial(objectives.preference, terms={"aot": 1.0}, beta=0.5),
    "kto": functools.partial(objectives.judged, loss="kto", beta=2.0),
}


def gradient(pairwise, split, batch, microbatches=1, mesh=None):
    """The gradient and metrics of a step: what SGD with rate 1 takes off."""
    trainable, frozen = jax.tree.map(jnp.copy, split)
    if mesh is not None:
        trainable, frozen = jax.device_put((trainable, frozen), sharding.whole(mesh))
        batch = jax.device_put(batch, sharding.batch(batch, mesh))
    tx = optax.sgd(1.0)
    state = train.init(trainable, tx, jax.random.key(0), mesh)
    shards = None if mesh is None else sharding.of(state)
    how = {"prepare": pairwise.prepare, "microbatches": microbatches, "shardings": shards}
    step = train.make_step(pairwise.objective, tx, **how)
    before = jax.tree.map(np.asarray, state.trainable)
    state, metrics = step(state, frozen, batch)
    return jax.tree.map(lambda a, b: a - np.asarray(b), before, state.trainable), jax.device_get(metrics)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_and_metrics_do_not_depend_on_microbatches_and_mesh(model, moved, batch, kind):
    pairwise = KINDS[kind](model)
    wanted, told = gradient(pairwise, moved, batch)
    found, said = gradient(pairwise, moved, batch, 2, sharding.mesh(2, 1, 1, 2, devices=jax.devices()[:4]))
    for name, value in told.items():
        assert float(said[name]) == pytest.approx(float(value), rel=2e-5, abs=2e-6), name
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-6)
    if kind == "kto":  # and the check can fail: the KL of a part of the step is another one
        apart = gradient(pairwise._replace(prepare=None), moved, batch, 4)[1]["loss"]
        assert abs(float(apart) - float(told["loss"])) > 3e-5


@pytest.mark.parametrize("kind", ["sigmoid and sft", "kto"])
def test_a_reference_that_comes_with_the_batch_gives_the_same(model, moved, batch, kind):
    variables = tree.combine(*moved)
    known = objectives.said(model)(objectives.reference(variables), batch)
    given = batch._replace(reference=jnp.stack([known["chosen"], known["rejected"]], axis=-1))
    live = KINDS[kind](model).each(variables, batch)
    kept = KINDS[kind](model, reference="precomputed").each(variables, given)
    assert set(live) - set(kept) == {"kl"}
    for name, values in kept.items():
        np.testing.assert_allclose(values, live[name], atol=1e-6)


def test_where_the_base_trains_the_reference_is_what_it_was(model, base, batch):
    pairwise = objectives.preference(model, {"sigmoid": 1.0})
    params = jax.tree.map(lambda x: 1.1 * x, base["params"])
    found = pairwise.each({"params": params, "reference": base["params"]}, batch)
    then = objectives.said(model)(base, batch)
    np.testing.assert_allclose(
        found["rewards_chosen"], 0.1 * (found["logps_chosen"] - then["chosen"]) * batch.exists, atol=1e-6
    )
    assert float(jnp.abs(found["margin"]).max()) > 1e-3
    moves = jax.grad(lambda r: pairwise.objective({"params": params, "reference": r}, batch, None).loss)(base["params"])
    assert not any(np.asarray(g).any() for g in jax.tree.leaves(moves))


def test_ld_dpo_weighs_what_the_longer_answer_says_beyond_the_shorter(model, base, batch, alone):
    alpha = 0.25
    found = objectives.said(model, ld_alpha=alpha)(base, batch)
    whole = objectives.said(model, ld_alpha=1.0)(base, batch)
    cut = objectives.said(model, ld_alpha=0.0)(base, batch)
    plain = objectives.said(model)(base, batch)
    for side in ("chosen", "rejected"):
        np.testing.assert_allclose(whole[side], plain[side], atol=1e-6)
        np.testing.assert_allclose(found[side], cut[side] + alpha * (whole[side] - cut[side]), atol=1e-5)
    chosen, rejected = made()[3]  # alone in row 1
    n = min(int(chosen.mask.sum()), int(rejected.mask.sum()))
    short = [
        data.Example(x.ids[: len(x.ids) - int(x.mask.sum()) + n], x.mask[: len(x.ids) - int(x.mask.sum()) + n])
        for x in (chosen, rejected)
    ]
    for side, example in zip(("chosen", "rejected"), short, strict=True):
        assert float(cut[side][1, 0]) == pytest.approx(alone(base, example), abs=2e-5)


@pytest.mark.parity  # a long one
def test_wpo_weighs_pairs_by_how_likely_the_policy_writes_them(model, base, batch):
    plain = objectives.preference(model, {"sft": 1.0}).each(base, batch)
    found = objectives.preference(model, {"sft": 1.0}, wpo=True).each(base, batch)
    for number in (3, 6):
        row = next(r for r, line in enumerate(PLAN) if line[0] == number)
        wanted = 1.0
        for example in made()[number]:
            ids = jnp.asarray(example.ids)[None]
            where = {"positions": jnp.arange(ids.shape[1])[None], "segments": jnp.ones_like(ids)}
            features = model.features(base, ids, *where.values())
            scores = features[0] @ model.output(base).T
            p = np.asarray(jax.nn.softmax(scores.astype(jnp.float32)), np.float64)
            terms = [
                math.log(p[t - 1, example.ids[t]]) - math.log((p[t - 1] ** 2).sum())
                for t in np.flatnonzero(example.mask)
            ]
            wanted *= math.exp(sum(terms) / len(terms))
        assert float(found["loss"][row, 0] / plain["loss"][row, 0]) == pytest.approx(wanted, rel=1e-4)


def test_a_batch_of_padding_has_no_loss_and_no_nan(model, adapted, batch):
    empty = Pairs(*(jnp.zeros_like(x) for x in batch))._replace(row=jnp.full_like(batch.row, -1))
    for kind in KINDS.values():
        sums = kind(model).objective(tree.combine(*adapted), empty, None)
        assert float(sums.loss) == float(sums.weight) == 0.0
        assert all(np.isfinite(np.asarray(x)).all() for x in jax.tree.leaves(sums.metrics))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"loss": "sigmiod"}, "did you mean sigmoid"),
        ({"loss": {"kto": 1.0, "sft": 1.0}}, "kto judges answers one by one, and stands alone"),
        ({"loss": "kto", "ld_alpha": 0.5}, "preference.ld_alpha is for losses over pairs"),
        ({"loss": "hinge", "options": {"gamma": 1.0}}, "gamma"),
        ({"loss": "kto", "options": {"gamma": 1.0}}, "gamma"),
        ({"loss": {"kto": 0.5}}, "stands alone, at weight 1"),
        ({"beta": -0.1}, "preference.beta is -0.1; it must be above 0"),
        ({"ld_alpha": 2.0}, "preference.ld_alpha is 2.0; it must be between 0 and 1"),
        ({"loss": "aot_unpaired", "wpo": True}, "wpo weighs single pairs, and aot_unpaired sorts all of a step"),
        ({"loss": "robust", "label_smoothing": 0.6}, "0.6"),
        ({"options": {"divergence": "jensen"}}, "jensen"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused_before_a_model_is_read(config, message):
    with pytest.raises(ValueError, match=message):
        objectives.of(objectives.Config(**config))


@pytest.mark.parametrize("name", [*losses.PREFERENCE, *losses.UNPAIRED])
def test_every_loss_can_be_configured(model, adapted, batch, name):
    pairwise = objectives.of(objectives.Config(loss=name, beta=0.2))(model)
    sums = jax.eval_shape(pairwise.objective, tree.combine(*adapted), batch, jax.random.key(0))
    assert sums.loss.dtype == jnp.float32
    assert ("kl" in sums.metrics) == (name not in losses.WITHOUT_REFERENCE)
    assert ("margin" in sums.metrics) == (name in losses.PREFERENCE)
