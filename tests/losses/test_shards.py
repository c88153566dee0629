import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxsft import axes, losses, sharding

# A mesh of eight devices: which axes have more than one, how tokens and table lie, and the table's slice on a device.
MESHES = [{"tensor": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 2, "context": 2, "tensor": 2}]
LARGE = (8, 16, 32, 96)  # B, T, D, V: no two of a device's slices are as long as V or a multiple of it


@functools.cache
def large():
    draw = np.random.default_rng(1)
    B, T, D, V = LARGE
    features, table = draw.normal(size=(B, T, D)), draw.normal(size=(V, D)) / 2
    mask = (draw.random((B, T)) < 0.6) & (np.arange(B) != 1)[:, None]
    given = features, table, draw.integers(0, V, (B, T)), mask, draw.normal(size=(B, T))
    return tuple(jnp.asarray(x) for x in given)


def pulled(mesh, trains, learned):
    """The function that gives values of all kinds, and gradients to features and, where it trains, the table."""

    def total(learn, frozen, targets, mask, weights):
        given = {**frozen, **learn, "targets": targets, "mask": mask}
        head = {"mesh": mesh, "chunk": losses.Chunk(8, 10), "soft_cap": 5.0}
        lp, entropy = losses.entropies(**given, **head, learned=learned)
        best = losses.top1(**given, **head)[1]
        met = losses.collision(given["features"], given["table"], mask, **head)
        return (lp * weights + entropy * weights[::-1]).sum(), (lp, entropy, best, met)

    def run(features, table, *others):
        learn = {"features": features, "table": table}
        frozen = {} if trains else {"table": learn.pop("table")}
        return jax.value_and_grad(total, has_aux=True)(learn, frozen, *others)

    return jax.jit(run)


@functools.cache
def alone(trains, learned):
    return pulled(None, trains, learned)(*large())


def placed(shape):
    mesh = sharding.mesh(**{"data": 1, **shape})
    tokens = NamedSharding(mesh, PartitionSpec(axes.ROWS, axes.CONTEXT))
    table = NamedSharding(mesh, PartitionSpec(axes.TENSOR, axes.FSDP))
    return mesh, [jax.device_put(x, table if i == 1 else tokens) for i, x in enumerate(large())]


@pytest.mark.parametrize(("trains", "learned"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_on_a_mesh_values_and_gradients_are_those_of_one_device(shape, trains, learned):
    mesh, given = placed(shape)
    ours, theirs = pulled(mesh, trains, learned)(*given), alone(trains, learned)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=2e-5), ours, theirs)
    assert float(jnp.abs(theirs[1]["features"]).max()) > 0.1
    if trains:
        assert ours[1]["table"].sharding.is_equivalent_to(given[1].sharding, 2)


COLLECTIVE = re.compile(r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_what_devices_exchange_is_no_scores_and_no_table_over_tensor_and_the_table_once_over_fsdp(shape, trains):
    mesh, given = placed(shape)
    B, T, D, V = LARGE
    found = lambda features, table: losses.logprobs(
        features, table, *given[2:4], mesh=mesh, chunk=losses.Chunk(8, 10)
    ).sum()
    grad = jax.jit(jax.grad(found, (0, 1) if trains else 0))
    text = grad.lower(*given[:2]).compile().as_text()
    slices = V // mesh.shape["tensor"]
    own = B * T // (axes.rows(mesh) * mesh.shape["context"])  # tokens of a device
    gathered = []
    for line in text.splitlines():
        if not (collective := COLLECTIVE.search(line)):
            continue
        shapes = [tuple(map(int, x.split(","))) for x in re.findall(r"f32\[([\d,]+)\]", collective[1])]
        gathered += shapes if collective[2] == "all-gather" else []
        assert "while" not in re.search(r'op_name="([^"]*)"', line)[1]
        # numbers and gradients of the device's own tokens, or its rows of the table
        assert set(shapes) <= {(own,), (own, D), (slices, D), (slices, D // mesh.shape["fsdp"])}
    assert gathered == [(slices, D)] * (mesh.shape["fsdp"] > 1)
