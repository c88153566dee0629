import gc
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxsft import checkpoint, sharding, train
from jaxsft.run import RunError

TX = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))
CONFIG = {"model.path": "base", "optim.clip": 1.0, "run.output_dir": "a"}


def state_on(mesh, spec, seed=0):
    value = jax.random.normal(jax.random.key(seed), (8, 4))
    leaf = jax.device_put(value, NamedSharding(mesh, spec))
    state = train.init({"lora": {"a": leaf}}, TX, jax.random.key(5), mesh)
    updates, opt_state = TX.update({"lora": {"a": leaf}}, state.opt_state, state.trainable)
    return state._replace(step=jnp.int32(3), opt_state=opt_state), updates


def leaves(state):
    return [np.asarray(x) for x in jax.tree.leaves(state._replace(key=jax.random.key_data(state.key)))]


@pytest.fixture
def saved(tmp_path):
    state, _ = state_on(sharding.mesh(8, 1, 1), PartitionSpec("data", None))
    manager = checkpoint.open_folder(tmp_path / "checkpoints", keep=2)
    for step in (1, 2, 3):
        checkpoint.save(manager, state._replace(step=jnp.int32(step)), {"next_index": step}, CONFIG)
    checkpoint.close(manager)
    return tmp_path / "checkpoints", state


def test_a_state_comes_back_bitwise_on_another_mesh_with_its_position(saved):
    folder, state = saved
    like, _ = state_on(sharding.mesh(2, 2, 2), PartitionSpec("fsdp", "tensor"), seed=9)
    manager = checkpoint.open_folder(folder)
    found = checkpoint.restore(manager, like, {**CONFIG, "run.output_dir": "b"})
    checkpoint.close(manager)
    assert found
    got, position = found
    assert position == {"next_index": 3}
    for a, b in zip(leaves(got), leaves(state), strict=True):
        np.testing.assert_array_equal(a, b)
    assert got.trainable["lora"]["a"].sharding.spec == PartitionSpec("fsdp", "tensor")
    assert jax.random.uniform(got.key) == jax.random.uniform(jax.random.key(5))


def test_only_the_last_ones_stay(saved):
    folder, _ = saved
    assert sorted(p.name for p in folder.iterdir()) == ["2", "3"]


def test_a_folder_without_checkpoints_restores_nothing(tmp_path):
    state, _ = state_on(sharding.mesh(8, 1, 1), PartitionSpec("data", None))
    manager = checkpoint.open_folder(tmp_path / "new")
    assert checkpoint.restore(manager, state, CONFIG) is None
    checkpoint.close(manager)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # reads that the error left behind
def test_a_checkpoint_that_was_cut_short_names_its_folder(saved):
    folder, state = saved
    for file in (folder / "3" / "state").rglob("*"):
        if file.is_file() and "ocdbt" not in file.name and file.parent.name == "d":
            file.write_bytes(file.read_bytes()[:10])
    manager = checkpoint.open_folder(folder)
    with pytest.raises(RunError, match=r"checkpoint .*3 cannot be read .*delete that folder"):
        checkpoint.restore(manager, state, CONFIG)
    checkpoint.close(manager)
    time.sleep(0.2)
    gc.collect()


def test_trained_leaves_and_configuration_read_without_a_state(saved):
    folder, state = saved
    got = checkpoint.read_trained(folder / "3")
    assert isinstance(got["lora"]["a"], np.ndarray)
    np.testing.assert_array_equal(got["lora"]["a"], state.trainable["lora"]["a"])
    assert checkpoint.read_config(folder / "3") == CONFIG


def test_a_contradicting_configuration_names_key_and_both_values():
    with pytest.raises(RunError, match=r"optim.clip is 2.0, was 1.0; new.key is 3, was None"):
        checkpoint.check(CONFIG, {**CONFIG, "optim.clip": 2.0, "new.key": 3})
    checkpoint.check(CONFIG, {**CONFIG, "run.resume": True, "mesh.fsdp": 2, "train.save_every": 9})
