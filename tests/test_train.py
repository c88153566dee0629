import dataclasses
import functools
import math
import signal
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxsft import lora, models, objectives, sharding, train, tree
from jaxsft.hosts import Stopped
from jaxsft.run import Log, RunError, read_metrics
from jaxsft.types import Pairs, State, Sums, Tokens

CONFIG = models.DecoderConfig(
    vocab_size=64, hidden=32, mlp_hidden=48, layers=2, heads=4, kv_heads=2, head_dim=8, max_position=64, tied=True
)
ROWS, LENGTH = 8, 24


@pytest.fixture(scope="module")
def model():
    return models.build(CONFIG)


@pytest.fixture(scope="module")
def variables(model):
    params = jax.tree.map(np.asarray, jax.jit(model.init)(jax.random.key(0)))
    adapter = lora.init(jax.random.key(1), params, lora.LoRA(rank=2, alpha=2.0))
    noisy = lambda path, x: 0.1 * np.random.default_rng(len(path)).normal(size=x.shape) if path.endswith("/b") else x
    leaves = {path: np.asarray(noisy(path, x), np.float32) for path, x in tree.flat(adapter).items()}
    return {"params": params, "lora": tree.nest(leaves)}


@pytest.fixture(scope="module")
def batch() -> Tokens:
    """Rows with very different numbers of learned tokens, two documents in some, one row that is all padding."""
    rng = np.random.default_rng(3)
    tokens = rng.integers(0, 64, (ROWS, LENGTH), dtype=np.int32)
    mask, positions, segments = (np.zeros((ROWS, LENGTH), np.int32) for _ in range(3))
    for row in range(ROWS - 1):
        first, second = int(rng.integers(2, 10)), int(rng.integers(0, 12))
        segments[row, :first], segments[row, first : first + second] = 1, 2
        positions[row, :first], positions[row, first : first + second] = np.arange(first), np.arange(second)
        mask[row, : first + second] = rng.random(first + second) < 0.3 + 0.1 * row
    mask[0, :] = 0
    mask[0, 1] = 1
    return Tokens(tokens, mask > 0, positions, segments)


def gradients(model, variables, batch, pattern, *, mesh_shape=(1, 1, 1), microbatches=1, family="llama"):
    """The step's gradient, read off one step of gradient descent with rate 1."""
    n = math.prod(mesh_shape)
    mesh = sharding.mesh(*mesh_shape, devices=jax.devices()[:n])
    model = models.build(model.config, mesh=mesh)
    rules = models.FAMILIES[family].rules
    placed = {
        "params": sharding.shardings(variables["params"], rules, mesh),
        "lora": sharding.shardings(variables["lora"], lora.rules(rules), mesh),
    }
    trainable, frozen = tree.partition(jax.tree.map(jax.device_put, variables, placed), pattern)
    tx = optax.sgd(1.0)
    state = train.init(trainable, tx, jax.random.key(0), mesh)
    before = jax.tree.map(np.asarray, trainable)
    step = train.make_step(objectives.supervised(model), tx, microbatches=microbatches, shardings=sharding.of(state))
    [placed_batch] = train.place([types.SimpleNamespace(tokens=batch, count=1, position={})], mesh)
    state, metrics = step(state, frozen, placed_batch.batch)
    assert sharding.of(state.trainable) == tree.partition(placed, pattern)[0]
    after = jax.tree.map(np.asarray, state.trainable)
    grads = jax.tree.map(lambda b, a: b.astype(np.float64) - a, before, after)
    return tree.flat(grads), {name: float(value) for name, value in metrics.items()}


SPLITS = [
    pytest.param({"microbatches": 2}, id="2 microbatches"),
    pytest.param({"microbatches": 4}, id="4 microbatches"),
    pytest.param({"mesh_shape": (8, 1, 1)}, id="mesh 8x1x1"),
    pytest.param({"mesh_shape": (2, 4, 1)}, id="mesh 2x4x1"),
    pytest.param({"mesh_shape": (2, 2, 2)}, id="mesh 2x2x2"),
    pytest.param({"mesh_shape": (2, 2, 2), "microbatches": 2}, id="mesh 2x2x2, 2 microbatches"),
    pytest.param({"mesh_shape": (1, 2, 2, 2), "microbatches": 2}, id="mesh 1x2x2, context 2, 2 microbatches"),
]


@pytest.fixture(scope="module")
def unsplit(model, variables, batch):
    return gradients(model, variables, batch, ["params/.*", lora.TRAINABLE])


@pytest.mark.parametrize("split", SPLITS)
def test_the_gradient_is_the_same_however_the_batch_is_split(split, unsplit, model, variables, batch):
    wanted, metrics = unsplit
    got, got_metrics = gradients(model, variables, batch, ["params/.*", lora.TRAINABLE], **split)
    assert got_metrics["trained_tokens"] == metrics["trained_tokens"]
    assert got_metrics["loss"] == pytest.approx(metrics["loss"], abs=1e-6)
    for path, grad in wanted.items():
        np.testing.assert_allclose(got[path], grad, atol=1e-6, err_msg=path)


@pytest.mark.parity  # a long one
def test_a_mixture_has_the_same_gradient_on_a_mesh_that_shares_out_experts_and_cuts_rows(batch):
    mixed = models.moe.MoE(experts=4, active=2, hidden=12, balance=0.1)
    model = models.build(dataclasses.replace(CONFIG, moe=mixed))
    params = jax.tree.map(np.asarray, jax.jit(model.init)(jax.random.key(0)))
    made = tree.flat(jax.device_get(lora.init(jax.random.key(1), params, lora.LoRA(rank=2))))
    noisy = {path: x + np.float32(0.1) * path.endswith("/b") for path, x in made.items()}
    how = (model, {"params": params, "lora": tree.nest(noisy)}, batch, ["params/.*", lora.TRAINABLE])
    wanted, metrics = gradients(*how, family="mixtral")
    got, got_metrics = gradients(*how, family="mixtral", mesh_shape=(1, 1, 2, 2, 2))
    assert got_metrics["loss"] == pytest.approx(metrics["loss"], abs=1e-6)
    for path, grad in wanted.items():
        assert np.abs(grad).max() > 0, path
        np.testing.assert_allclose(got[path], grad, rtol=1e-4, atol=1e-5, err_msg=path)


def test_tables_that_a_mesh_does_not_divide_have_the_same_gradient(batch):
    """As tables have to which new tokens brought rows: each device then holds all of them."""
    model = models.build(dataclasses.replace(CONFIG, vocab_size=67, layers=1, tied=False))
    variables = {"params": jax.tree.map(np.asarray, jax.jit(model.init)(jax.random.key(0))), "lora": {}}
    wanted, metrics = gradients(model, variables, batch, "params/(embed|head)/table")
    got, got_metrics = gradients(model, variables, batch, "params/(embed|head)/table", mesh_shape=(2, 2, 2))
    assert got_metrics["loss"] == pytest.approx(metrics["loss"], abs=1e-6)
    for path, grad in wanted.items():
        assert grad.shape == (67, 32)
        np.testing.assert_allclose(got[path], grad, atol=1e-6, err_msg=path)
    assert np.abs(wanted["params/head/table"][64:]).max() > 0  # tokens that no row has take part in every score


@pytest.mark.parity  # a long one
def test_every_kind_of_adapter_has_the_same_gradient_on_a_mesh(model, variables, batch):
    """DoRA from PiSSA's start, also on the tied embedding and output layer, whose widened table is cut unevenly."""
    spec = lora.LoRA(rank=3, alpha=2.0, dora=True, init="pissa", targets=f"embed|head|{lora.ALL}")
    made = tree.flat(jax.device_get(lora.init(jax.random.key(1), variables["params"], spec)))
    every = {
        **variables,
        "lora": tree.nest({p: x + np.float32(0.1) * p.endswith(("/a", "/b")) for p, x in made.items()}),
    }
    wanted, metrics = gradients(model, every, batch, lora.TRAINABLE)
    got, got_metrics = gradients(model, every, batch, lora.TRAINABLE, mesh_shape=(2, 2, 2))
    assert got_metrics["loss"] == pytest.approx(metrics["loss"], abs=1e-5)
    for path, grad in wanted.items():
        assert np.abs(grad).max() > 0, path
        np.testing.assert_allclose(got[path], grad, atol=1e-5, err_msg=path)


def test_loss_and_gradient_are_the_plain_mean_over_learned_tokens(unsplit, model, variables, batch):
    """Against whole logits, a Python loop over tokens, and jax.grad of that."""

    def plain(variables):
        features = model.features(variables, batch.tokens, batch.positions, batch.segments)
        lp = jax.nn.log_softmax(models.logits(model, variables, features))
        total, count = 0.0, 0
        for b in range(ROWS):
            for t in range(1, LENGTH):
                same = batch.segments[b, t] == batch.segments[b, t - 1] > 0
                if batch.mask[b, t] and same:
                    total, count = total - lp[b, t - 1, batch.tokens[b, t]], count + 1
        return total / count, count

    (loss, count), grads = jax.value_and_grad(plain, has_aux=True)(variables)
    got, metrics = unsplit
    assert metrics["trained_tokens"] == count
    assert metrics["loss"] == pytest.approx(float(loss), abs=1e-6)
    assert metrics["grad_norm"] == pytest.approx(math.sqrt(sum((g**2).sum() for g in got.values())), rel=1e-5)
    wanted = tree.flat(grads)
    for path, grad in got.items():
        np.testing.assert_allclose(grad, wanted[path], atol=1e-6, err_msg=path)


def test_lora_trains_its_leaves_alone_and_leaves_the_rest_bitwise(model, variables, batch):
    fresh = {
        "params": variables["params"],
        "lora": lora.init(jax.random.key(1), variables["params"], lora.LoRA(rank=2, alpha=2.0)),
    }
    trainable, frozen = tree.partition(jax.tree.map(jnp.array, fresh), lora.TRAINABLE)
    before = jax.tree.map(np.array, frozen)
    tx = optax.adamw(1e-2)
    state = train.init(jax.tree.map(jnp.array, trainable), tx, jax.random.key(0))
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.ndim]
    assert sum(x.size for x in moments) == 2 * tree.count(trainable)
    step = train.make_step(objectives.supervised(model), tx)
    state, _ = step(state, frozen, batch)
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.array, frozen))
    grad = jax.grad(lambda t: objectives.supervised(model)(tree.combine(t, frozen), batch, None).loss)
    for path, leaf in tree.flat(grad(state.trainable)).items():
        assert np.abs(leaf).max() > 0, f"{path} has no gradient after one step"


def test_the_lora_step_has_clearly_fewer_flops_than_the_full_step(model, variables, batch):
    def flops(pattern):
        trainable, frozen = tree.partition(jax.tree.map(jnp.array, variables), pattern)
        tx = optax.sgd(0.1)
        step = train.make_step(objectives.supervised(model), tx)
        compiled = step.lower(train.init(trainable, tx, jax.random.key(0)), frozen, batch).compile()
        return compiled.cost_analysis()["flops"]

    assert flops(lora.TRAINABLE) < 0.85 * flops(["params/.*", lora.TRAINABLE])


def quadratic(variables, batch, key):
    return Sums(((variables["w"] - batch) ** 2).sum(), jnp.float32(batch.size), {})


def placed(values):
    return [train.Placed(jnp.float32(v), 1, {"next_index": i + 1}) for i, v in enumerate(values)]


def fit(tmp_path, values, *, rate=0.25, steps=None, **more):
    tx = optax.sgd(rate)
    state = train.init({"w": jnp.zeros(())}, tx, jax.random.key(0))
    log, saved = Log(tmp_path), []
    done = train.fit(
        train.make_step(quadratic, tx),
        state,
        {},
        placed(values),
        steps=steps or len(values),
        log=log,
        rate=lambda step: rate,
        save=lambda state, position: saved.append((int(state.step), float(state.trainable["w"]), position)),
        **more,
    )
    return done, read_metrics(tmp_path / "metrics.jsonl"), saved


def test_fit_logs_every_step_evaluates_and_saves_when_asked(tmp_path):
    state, metrics, saved = fit(
        tmp_path,
        [1.0, 2.0, 3.0, 4.0, 5.0],
        evaluate=lambda s: {"loss": float(s.trainable["w"])},
        eval_every=2,
        save_every=2,
    )
    w, wanted = 0.0, {}
    for i, x in enumerate([1.0, 2.0, 3.0, 4.0, 5.0], 1):
        loss, w = (w - x) ** 2, w - 0.25 * 2 * (w - x)
        wanted[i] = (loss, w)
    assert isinstance(state, State)
    assert float(state.trainable["w"]) == pytest.approx(w)
    steps = [row for row in metrics if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5]
    assert [row["loss"] for row in steps] == pytest.approx([wanted[i][0] for i in range(1, 6)])
    keys = {"step", "loss", "learning_rate", "grad_norm", "tokens_per_second", "trained_tokens"}
    assert all(set(row) == keys for row in steps)
    held = [(row["step"], row["eval_loss"]) for row in metrics if "eval_loss" in row]
    assert held == [(i, pytest.approx(wanted[i][1])) for i in (2, 4, 5)]
    assert [(s, p["next_index"]) for s, _, p in saved] == [(2, 2), (4, 4), (5, 5)]
    assert [w for _, w, _ in saved] == pytest.approx([wanted[i][1] for i in (2, 4, 5)])


def test_a_loss_that_is_not_finite_stops_at_its_step_and_saves_nothing_after_it(tmp_path):
    with pytest.raises(RunError, match=r"step 3: loss nan.*last good checkpoint.*learning_rate"):
        fit(tmp_path, [1.0, 2.0, float("nan"), 4.0, 5.0, 6.0], save_every=1)
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


def test_no_checkpoint_holds_a_step_whose_loss_is_not_finite(tmp_path):
    saved, tx = [], optax.sgd(0.25)
    run = functools.partial(
        train.fit,
        train.make_step(quadratic, tx),
        train.init({"w": jnp.zeros(())}, tx, jax.random.key(0)),
        {},
        placed([1.0, 2.0, float("nan"), 4.0]),
        steps=4,
        log=Log(tmp_path),
        rate=lambda step: 0.25,
        save=lambda state, position: saved.append(int(state.step)),
        save_every=1,
    )
    with pytest.raises(RunError, match="step 3"):
        run()
    assert saved == [1, 2]


@pytest.mark.parametrize(("signalled", "stopped"), [(2, 2), (5, 5)])
def test_a_signal_ends_the_loop_after_the_step_it_fell_into_with_a_checkpoint(signalled, stopped, tmp_path):
    """At the last step, too, which is evaluated all the same; the others are saved and nothing else."""
    saved, evaluated, tx = [], [], optax.sgd(0.25)
    step = train.make_step(quadratic, tx)

    def interrupted(state, frozen, batch):
        if int(state.step) + 1 == signalled:
            signal.raise_signal(signal.SIGTERM)
        return step(state, frozen, batch)

    with pytest.raises(Stopped, match=f"stopped by SIGTERM after step {stopped}; go on with --run.resume true"):
        train.fit(
            interrupted,
            train.init({"w": jnp.zeros(())}, tx, jax.random.key(0)),
            {},
            placed([1.0, 2.0, 3.0, 4.0, 5.0]),
            steps=5,
            log=Log(tmp_path),
            rate=lambda step: 0.25,
            save=lambda state, position: saved.append((int(state.step), float(state.trainable["w"]), position)),
            evaluate=lambda state: evaluated.append(int(state.step)) or {"loss": 0.0},
            eval_every=2,
        )
    w = 0.0
    for value in range(1, stopped + 1):
        w -= 0.25 * 2 * (w - value)
    assert saved == [(stopped, pytest.approx(w), {"next_index": stopped})]
    assert evaluated == ([2, 4, 5] if stopped == 5 else [])
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl") if "loss" in row] == [
        *range(1, stopped + 1)
    ]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_data_that_ends_too_early_is_said(tmp_path):
    with pytest.raises(RunError, match="ended after step 2 of 9"):
        fit(tmp_path, [1.0, 2.0], steps=9)


def test_rows_that_do_not_cut_into_microbatches_are_refused():
    step = train.make_step(quadratic, optax.sgd(0.1), microbatches=2)
    state = train.init({"w": jnp.zeros(())}, optax.sgd(0.1), jax.random.key(0))
    with pytest.raises(ValueError, match="3 rows does not cut into 2"):
        step(state, {}, jnp.zeros(3))


def test_evaluation_is_the_mean_over_tokens_not_over_batches():
    sums = lambda variables, batch, key: Sums(batch["loss"].sum(), batch["weight"].sum(), {})
    evaluate = train.make_evaluation(sums)
    batches = [
        {"loss": jnp.array([6.0]), "weight": jnp.array([1.0])},
        {"loss": jnp.array([2.0]), "weight": jnp.array([7.0])},
    ]
    assert evaluate({}, {}, [train.Placed(b, 1, {}) for b in batches]) == {"loss": pytest.approx(1.0)}
    with pytest.raises(RunError, match="nothing that is learned"):
        evaluate({}, {}, [train.Placed({"loss": jnp.zeros(1), "weight": jnp.zeros(1)}, 1, {})])


def test_place_gives_every_batch_in_order_one_ahead():
    mesh = sharding.mesh(8, 1, 1)
    made = []

    def source():
        for i in range(3):
            made.append(i)
            yield types.SimpleNamespace(tokens=np.full((8, 2), i), count=i, position={"next_index": i})

    out = train.place(source(), mesh)
    first = next(out)
    assert made == [0, 1]
    rest = list(out)
    assert [int(b.batch[0, 0]) for b in [first, *rest]] == [0, 1, 2]
    assert [b.position["next_index"] for b in [first, *rest]] == [0, 1, 2]
    assert first.batch.sharding == sharding.rows(mesh)


def test_place_cuts_what_is_known_of_tokens_over_context_and_what_is_known_of_rows_not(batch):
    mesh, one = sharding.mesh(2, 1, 1, 4), np.zeros((ROWS, 1), np.float32)
    pairs = Pairs(*batch, one, one > 0, one.astype(int), np.zeros((ROWS, 1, 2), np.float32))
    [placed] = train.place([types.SimpleNamespace(tokens=pairs, count=1, position={})], mesh)
    for name, x in placed.batch._asdict().items():
        whole = getattr(pairs, name)
        rows, *rest = whole.shape
        length = [LENGTH // 4] if name in Tokens._fields else rest
        assert {shard.data.shape for shard in x.addressable_shards} == {(rows // 2, *length)}, name
        np.testing.assert_array_equal(x, whole)
