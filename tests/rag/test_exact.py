import jax.numpy as jnp
import numpy as np
import pytest

from jaxsft import sharding
from jaxsft.rag import exact


def truth(matrix, queries, k):
    order = np.argsort(-(queries @ matrix.T), axis=1)[:, :k]
    return np.take_along_axis(queries @ matrix.T, order, axis=1), order


def unit(draw, *shape):
    found = draw.standard_normal(shape, np.float32)
    return found / np.linalg.norm(found, axis=-1, keepdims=True)


@pytest.mark.parametrize(("count", "block"), [(1, 16_384), (5, 16_384), (1003, 16_384), (1003, 40)])
@pytest.mark.parametrize("recall_target", [None, 0.9])
def test_eight_devices_find_what_numpy_finds(monkeypatch, count, block, recall_target):
    monkeypatch.setattr(exact, "BLOCK", block)
    exact._nearest.clear_cache()
    draw = np.random.default_rng(count)
    matrix, queries = unit(draw, count, 12), unit(draw, 3, 12)
    scores, rows = exact.nearest(matrix, queries, 10, recall_target=recall_target)
    wanted, order = truth(matrix, queries, 10)
    np.testing.assert_allclose(scores, wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(rows, order)
    exact._nearest.clear_cache()


def test_a_placed_matrix_is_asked_again_on_a_mesh_of_two_axes():
    draw = np.random.default_rng(0)
    matrix = unit(draw, 300, 12)
    placed = exact.place(matrix, sharding.mesh(data=4, fsdp=2))
    assert len(placed.rows.addressable_shards) == 8
    assert placed.rows.addressable_shards[0].data.shape == (38, 12)
    for _ in range(2):
        queries = unit(draw, 2, 12)
        np.testing.assert_array_equal(exact.nearest(placed, queries, 3)[1], truth(matrix, queries, 3)[1])


def test_bfloat16_halves_the_memory_and_scores_are_float32():
    draw = np.random.default_rng(0)
    matrix, queries = unit(draw, 300, 12), unit(draw, 4, 12)
    placed = exact.place(matrix, dtype=jnp.bfloat16)
    scores, rows = exact.nearest(placed, queries, 5)
    assert (placed.rows.dtype, scores.dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_allclose(scores, truth(matrix, queries, 5)[0], atol=0.01)
    rounded = np.asarray(jnp.asarray(queries, jnp.bfloat16), np.float32), np.asarray(placed.rows[:300], np.float32)
    np.testing.assert_array_equal(rows, truth(rounded[1], rounded[0], 5)[1])


def test_wrong_shapes_are_told():
    with pytest.raises(ValueError, match=r"queries \(1, 3\) and a matrix of width 4"):
        exact.nearest(np.eye(4), np.zeros((1, 3)), 1)
    with pytest.raises(ValueError, match="k is 0"):
        exact.nearest(np.eye(4), np.zeros((1, 4)), 0)
