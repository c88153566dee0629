import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxsft import axes, models, sharding, tree
from jaxsft.hub import shapes
from jaxsft.models import DecoderConfig

RULES = (("embed/table", P("tensor", "fsdp")), (".*/kernel", P(None, "fsdp", "tensor")), ("norm/.*", P(None)))
FULL = DecoderConfig(
    96, 32, 48, 4, heads=4, kv_heads=2, head_dim=8, max_position=64, qkv_bias=True, out_bias=True, mlp_bias=True,
    qk_norm="head",
)  # fmt: skip


@pytest.fixture(scope="module")
def cube():
    return sharding.mesh(2, 2, 2)


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ((-1, 1, 1), (8, 1, 1)),
        ((1, -1, 1), (1, 8, 1)),
        ((2, 1, -1), (2, 1, 4)),
        ((2, 2, 2), (2, 2, 2)),
        ((-1, 8, 1), (1, 8, 1)),
    ],
)
def test_minus_one_takes_the_devices_that_are_left(lengths, expected):
    mesh = sharding.mesh(*lengths)
    assert tuple(mesh.shape[axis] for axis in ("data", "fsdp", "tensor")) == expected
    assert set(mesh.devices.flat) == set(jax.devices())


def test_a_mesh_may_be_of_some_devices():
    mesh = sharding.mesh(1, 2, -1, devices=jax.devices()[2:6])
    assert mesh.devices.shape == (1, 2, 1, 1, 2)
    assert list(mesh.devices.flat) == jax.devices()[2:6]


@pytest.mark.parametrize("lengths", [(-1, -1, 1), (3, 1, -1), (0, 1, 1), (-2, 1, 1), (-1, 16, 1)])
def test_lengths_that_do_not_fit_the_devices_are_refused(lengths):
    with pytest.raises(ValueError, match="does not fit 8 devices; the product must divide it, one axis may be -1"):
        sharding.mesh(*lengths)


def test_a_mesh_that_leaves_devices_idle_is_refused():
    with pytest.raises(ValueError, match="data 2 x fsdp 1 x tensor 2 uses 4 of 8 devices; set one axis to -1"):
        sharding.mesh(2, 1, 2)


def test_the_first_rule_that_matches_the_whole_path_decides(cube):
    rules = (("a/.*", P("fsdp")), (".*/x", P("tensor")))
    assert sharding.spec("a/x", (4,), rules, cube) == P("fsdp")
    assert sharding.spec("b/x", (4,), rules, cube) == P("tensor")


def test_an_axis_that_does_not_divide_a_dimension_is_left_out_there(cube):
    assert sharding.spec("q/kernel", (5, 6, 7), RULES, cube) == P(None, "fsdp", None)
    assert sharding.spec("q/kernel", (4, 3, 8), RULES, cube) == P(None, None, "tensor")


def test_a_leaf_without_a_rule_raises(cube):
    with pytest.raises(ValueError, match=r"no sharding rule for x/weight \(2, 2\); add one to FAMILY.rules"):
        sharding.shardings({"x": {"weight": np.zeros((2, 2))}}, RULES, cube)


def test_a_rule_of_another_number_of_dimensions_raises(cube):
    with pytest.raises(ValueError, match=r"'norm/\.\*' has 1 dimensions, but norm/w has shape \(2, 2\)"):
        sharding.spec("norm/w", (2, 2), RULES, cube)


def test_each_device_holds_its_slice_of_an_array(cube):
    table = np.arange(8 * 6).reshape(8, 6)
    placed = jax.device_put(table, sharding.shardings({"embed": {"table": table}}, RULES, cube)["embed"]["table"])
    for d, f, t in np.ndindex(2, 2, 2):
        (shard,) = [s for s in placed.addressable_shards if s.device == cube.devices[d, f, 0, 0, t]]
        np.testing.assert_array_equal(shard.data, table[4 * t : 4 * t + 4, 3 * f : 3 * f + 3])


def test_a_batch_is_cut_by_rows_over_data_and_fsdp(cube):
    rows = jax.device_put(np.arange(8 * 3).reshape(8, 3), sharding.rows(cube))
    assert {shard.data.shape for shard in rows.addressable_shards} == {(2, 3)}
    assert jax.device_put(np.arange(3), sharding.whole(cube)).is_fully_replicated
    assert sharding.of({"x": rows})["x"] == sharding.rows(cube)


@dataclasses.dataclass(frozen=True)
class Device:
    """One of a TPU's, as far as a mesh asks."""

    id: int
    slice_index: int
    process_index: int = 0
    device_kind: str = "fake"
    platform: str = "fake"


SLICES = [Device(i, i // 4) for i in (4, 5, 6, 7, 0, 1, 2, 3)]


@pytest.mark.parametrize(
    ("lengths", "dcn", "shape"),
    [((-1, 2, 2), "data", (2, 2, 2)), ((2, -1), "fsdp", (2, 4, 1)), ((-1,), "data", (8, 1, 1))],
)
def test_one_axis_alone_goes_from_slice_to_slice(lengths, dcn, shape):
    mesh = sharding.mesh(*lengths, dcn=dcn, devices=SLICES)
    assert tuple(mesh.shape[axis] for axis in ("data", "fsdp", "tensor")) == shape
    assert set(mesh.devices.flat) == set(SLICES)
    at = {device: place for place, device in np.ndenumerate(mesh.devices)}
    along = mesh.axis_names.index(dcn)
    half = mesh.devices.shape[along] // 2
    assert all((place[along] >= half) == bool(device.slice_index) for device, place in at.items())


def test_an_axis_that_the_slices_do_not_divide_is_refused_with_the_counts():
    with pytest.raises(
        ValueError, match="mesh.data is 1, which the 2 slices of 4 devices do not divide; set it to a mul"
    ):
        sharding.mesh(1, 8, devices=SLICES)


def test_rows_that_context_does_not_divide_are_refused():
    mesh = sharding.mesh(4, 1, 1, 2)
    sharding.check_length(24, mesh)
    with pytest.raises(
        ValueError, match="mesh.context is 2, which does not divide the 25 tokens of a row; set it to 1"
    ):
        sharding.check_length(25, mesh)


def test_every_matrix_of_a_llama_is_cut_both_ways(cube):
    leaves = tree.flat(shapes(FULL, cut=2))
    placed = tree.flat(sharding.shardings(tree.nest(leaves), models.FAMILIES["llama"].rules, cube))
    assert set(placed) == set(leaves)
    for path in leaves:
        cut = {axis for axis in placed[path].spec if axis}
        if path.endswith(("kernel", "table")):
            assert cut == {"fsdp", "tensor"}, path


def grid(processes: int, *shape: int) -> Mesh:
    """A mesh of devices that only say whose they are."""
    count = int(np.prod(shape))
    devices = [SimpleNamespace(process_index=i * processes // count) for i in range(count)]
    return SimpleNamespace(devices=np.array(devices).reshape(shape), shape=dict(zip(axes.ALL, shape, strict=True)))  # type: ignore


@pytest.mark.parametrize(
    ("processes", "shape", "wanted"),
    [
        (2, (8, 1, 1, 1, 1), [(0, 2), (1, 2)]),
        (4, (2, 2, 1, 1, 2), [(0, 4), (1, 4), (2, 4), (3, 4)]),
        (4, (1, 1, 2, 2, 2), [(0, 2), (0, 2), (1, 2), (1, 2)]),
        (2, (1, 1, 1, 1, 8), [(0, 1), (0, 1)]),
    ],
)
def test_processes_whose_devices_cut_the_same_rows_read_the_same(processes, shape, wanted, monkeypatch):
    found = []
    for index in range(processes):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        found.append(sharding.share(grid(processes, *shape)))
    assert found == wanted


def test_a_mesh_that_cuts_rows_over_parts_of_processes_is_refused():
    with pytest.raises(
        ValueError, match=r"mesh.context 1 x mesh.tensor 3 cuts rows over parts of processes; let that divide"
    ):
        sharding.share(grid(3, 4, 1, 1, 1, 3))


def test_a_rule_without_a_leaf_and_a_leaf_without_a_rule_are_refused_over_all_trees():
    first, second = {"embed": {"table": np.zeros((2, 2))}}, {"norm": {"scale": np.zeros(2)}}
    used = (RULES[0], RULES[2])
    sharding.check(used, first, second)
    with pytest.raises(ValueError, match=r"the sharding rules '\.\*/kernel' match no leaf; take them out"):
        sharding.check(RULES, first, second)
    with pytest.raises(ValueError, match=r"the sharding rules 'norm/\.\*' match no leaf"):
        sharding.check(used, first)
    with pytest.raises(ValueError, match=r"no sharding rule for x \(2,\)"):
        sharding.check(used, first, {"x": np.zeros(2)})
    behind = (*used, ("norm/scale", P("fsdp")))  # which the rule before it always takes
    with pytest.raises(ValueError, match="the sharding rules 'norm/scale' match no leaf"):
        sharding.check(behind, first, second)
