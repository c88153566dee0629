import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsft
from jaxsft import hub, models, objectives, optim, preflight, session, sharding, train, tree, tuning
from jaxsft.preflight import Sections

ROOT = Path(__file__).parents[1]
ONE, EIGHT = sharding.Config(1, 1, 1), sharding.Config(2, 2, 2)


def sections(path=jaxsft.BASE, mesh=ONE, method="lora", length=64, **train_):
    lora = tuning.LoRA(rank=4) if method == "lora" else tuning.LoRA()
    return Sections(
        hub.Config(str(path)),
        tuning.Config(method=method, lora=lora),
        optim.Config(),
        train.Config(**{"batch_size": 4, **train_}),
        mesh,
        length,
    )


def real(sections):
    """The variables and the state of the run itself."""
    mesh = sharding.mesh(*dataclasses.astuple(sections.mesh), devices=jax.devices()[: sections.mesh.data * 4 or 1])
    family, shape = hub.read_config(Path(sections.model.path))
    new, multiple = sections.model.new_tokens, sections.model.vocab_multiple
    _, vocabulary = hub.load_vocabulary(sections.model.path, new, multiple=multiple)
    plan = tuning.plan(sections.tuning, shape.layers, also=[models.TABLES] * bool(new))
    _, base = hub.load_variables(
        sections.model.path,
        mesh,
        dtype=jnp.dtype(sections.model.dtype),
        full_precision=plan.trainable,
        quantise=sections.model.quantise,
        vocabulary=vocabulary,
    )
    trainable, frozen = tuning.apply(plan, base, jax.random.key(0), mesh=mesh, rules=family.rules)
    tx = optim.build(sections.optim, 1)[0]
    return train.init(trainable, tx, jax.random.key(0), mesh), frozen, trainable, tx, mesh


def on_first(arrays) -> int:
    """Bytes that lie on the first device."""
    return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(arrays))


EXACT = [
    sections(mesh=EIGHT),
    sections(mesh=EIGHT, method="full")._replace(
        model=hub.Config(str(jaxsft.BASE), new_tokens=["<a>", "<b>"], vocab_multiple=9)
    ),
    sections(mesh=EIGHT)._replace(model=hub.Config(str(jaxsft.BASE), "bfloat16", quantise="nf4")),
]


@pytest.mark.parametrize("given", EXACT, ids=["lora", "full, new tokens", "nf4"])
def test_weights_and_optimizer_are_to_the_byte_those_of_the_run(given):
    need = preflight.measure(preflight.over_tokens(objectives.supervised), given)
    state, frozen, trainable, *_ = real(given)
    assert need.weights == on_first((state.trainable, frozen))
    assert need.optimizer == on_first(state.opt_state)
    assert need.trained == tree.count(trainable)
    assert need.working > 0


@pytest.mark.parametrize("critic", ["own", "shared"])
def test_a_critic_and_a_reference_take_what_they_take_in_the_run_and_rows_are_shared_out(critic):
    """Of three answers to a step, which four devices and two microbatches make eight rows of."""
    mesh = sharding.Config(2, 2, 2)
    given = sections(mesh=mesh, method="full", length=32, batch_size=3, microbatches=2)
    work = preflight.over_rollouts({"value_coef": 0.1}, answers=6, critic=critic, reference=True)
    need = preflight.measure(work, given)
    _, frozen, trainable, tx, placed = real(given)
    model, _ = hub.load_variables(given.model.path, placed)
    learner = session.with_reference(
        tuning.Learner(model, tuning.plan(given.tuning, model.config.layers), trainable, frozen)
    )
    learner = session.with_critic(learner, critic, placed)
    state = train.init(learner.trainable, tx, jax.random.key(0), placed)
    assert need.weights == on_first((state.trainable, learner.frozen))
    assert need.optimizer == on_first(state.opt_state)
    row = 4 * 32 + 32 + 2 * 4 * 32 + 5 * 4 * 32 + 1  # tokens, mask, positions, segments, five numbers, a flag
    assert need.batch == 2 * row
    assert need.cache > 0


def test_the_abstract_state_is_the_state_without_its_numbers():
    given = sections(mesh=EIGHT)
    state, _, trainable, tx, mesh = real(given)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), trainable)
    found = preflight.abstract_state(shapes, tx, mesh)
    assert jax.tree.structure(found) == jax.tree.structure(state)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(state), strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        assert ours.sharding.is_equivalent_to(theirs.sharding, theirs.ndim)


@pytest.mark.parity  # a long one
def test_config_json_is_all_it_reads_and_working_memory_follows_what_saves_it(tmp_path):
    (tmp_path / "config.json").write_text((Path(jaxsft.BASE) / "config.json").read_text())
    given = sections(tmp_path, length=512, batch_size=8)._replace(model=hub.Config(str(tmp_path), remat="none"))
    working = lambda given: preflight.measure(preflight.over_tokens(objectives.supervised), given).working
    plain = working(given)
    assert working(given._replace(train=train.Config(batch_size=8, microbatches=4))) < 0.6 * plain
    assert working(given._replace(model=hub.Config(str(tmp_path), remat="block"))) < 0.8 * plain


def test_rows_stay_on_their_device_where_weights_are_cut():
    """Activations once took the cut of the embedding's features, and every device then held those of all rows."""
    four = sections(mesh=sharding.Config(4, 1, 1), length=256)
    shared = four._replace(mesh=sharding.Config(1, 4, 1))
    apart, cut = (preflight.measure(preflight.over_tokens(objectives.supervised), given) for given in (four, shared))
    assert cut.weights < 0.5 * apart.weights
    assert cut.working < 1.5 * apart.working


def test_what_does_not_fit_is_shown_with_what_would_change_that(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    tried = []

    def measured(objective, given):
        tried.append(given)
        big = given.model.quantise == "none"
        return preflight.Need(3_000_000_000 if big else 1_000_000_000, 10**8, 10**6, 2 * 10**9, 0, 10**8, 5000, 50)

    monkeypatch.setattr(preflight, "measure", measured)
    preflight.show(preflight.over_tokens(objectives.supervised), sections(), 4.0)
    shown = capsys.readouterr().out
    assert "NO, a device has 4.000 GB" in shown
    assert "5.101 GB" in shown
    assert "5,000, of which 50 train" in shown
    assert [line.split("│")[3].strip() for line in shown.splitlines() if "--model" in line] == ["no", "no", "yes"]
    assert len(tried) == 5  # the run; bfloat16, remat, microbatches, quantise
    preflight.show(preflight.over_tokens(objectives.supervised), sections(), 6.0)
    shown = capsys.readouterr().out
    assert "yes, a device has 6.000 GB" in shown
    assert "what would change" not in shown


@pytest.mark.parity  # a long one
def test_a_script_plans_for_devices_that_are_not_there_and_writes_nothing(tmp_path):
    command = [sys.executable, str(ROOT / "scripts" / "sft.py"), "--config", str(ROOT / "configs" / "quickstart.yaml")]
    command += ["--run.plan", "true", "--run.output_dir", str(tmp_path / "run"), "--data.train", "nowhere.jsonl"]
    command += ["--mesh.data", "2", "--mesh.fsdp", "8", "--mesh.tensor", "1", "--train.batch_size", "16"]
    env = {**os.environ, "XLA_FLAGS": "", "COLUMNS": "200"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "16 CPU devices that stand for the run's own, mesh data 2 x fsdp 8 x tensor 1" in done.stdout
    assert "unknown; say a device's memory with --run.device_gb" in done.stdout
    assert not (tmp_path / "run").exists()
    weights = next(line for line in done.stdout.splitlines() if "weights" in line)
    assert float(weights.split("│")[2].split()[0]) == pytest.approx(0.0017, abs=0.0007)
    assert np.isfinite(float(next(x for x in done.stdout.splitlines() if "in all" in x).split("│")[2].split()[0]))
