import numpy as np
import pytest

from jaxsft.data.mix import counts, held_out
from jaxsft.data.rows import DataError


def sums(sizes, mix, **options):
    options = {"weights": [1] * len(sizes), "epochs": [1] * len(sizes), "seed": 0} | options
    return [int(c.sum()) for c in counts([np.ones(n, bool) for n in sizes], mix, **options)]


@pytest.mark.parametrize(
    ("sizes", "mix", "options", "expected"),
    [
        ([3, 5], "concat", {}, [3, 5]),
        ([3, 5], "concat", {"epochs": [3, 0.2]}, [9, 1]),
        ([100, 10], "interleave_under", {}, [10, 10]),
        ([100, 10], "interleave_over", {}, [100, 100]),
        ([100, 10], "interleave_under", {"weights": [4, 1]}, [40, 10]),
        ([100, 10], "interleave_over", {"weights": [4, 1]}, [100, 25]),
        ([100, 0], "interleave_over", {}, [100, 100]),
    ],
)
def test_how_many_rows_of_each_source(sizes, mix, options, expected):
    if 0 in sizes:
        expected = [100, 0]  # a source that has nothing left cannot repeat
    assert sums(sizes, mix, **options) == expected


def test_a_row_comes_as_often_as_every_other_or_once_more():
    (found,) = counts([np.ones(7, bool)], "concat", weights=[1], epochs=[2.5], seed=3)
    assert sorted(found.tolist()) == [2, 2, 2, 3, 3, 3, 3]  # 17.5 rows, rounded to even


def test_rows_that_are_held_out_do_not_come():
    kept = np.array([True, False, True, False])
    (found,) = counts([kept], "concat", weights=[1], epochs=[3], seed=0)
    assert found.tolist() == [3, 0, 3, 0]


def test_the_seed_chooses_the_part():
    drawn = {tuple(counts([np.ones(20, bool)], "concat", weights=[1], epochs=[0.5], seed=s)[0]) for s in (0, 0, 1)}
    assert len(drawn) == 2


def test_equal_hashes_fall_on_one_side_in_all_sources():
    draw = np.random.default_rng(0)
    sources = [draw.integers(0, 50, 200).astype(np.uint64) for _ in range(3)]
    sides = held_out(sources, 0.3, 0)
    where = {}
    for hashes, side in zip(sources, sides, strict=True):
        for value, held in zip(hashes.tolist(), side.tolist(), strict=True):
            assert where.setdefault(value, held) == held
    assert sum(where.values()) == round(0.3 * len(where))


def test_nothing_is_held_out_by_default():
    assert not held_out([np.arange(5, dtype=np.uint64)], 0, 0)[0].any()


@pytest.mark.parametrize("fraction", [-0.1, 1, 2])
def test_a_fraction_lies_between_none_and_all(fraction):
    with pytest.raises(DataError, match="it must lie between 0 and 1"):
        held_out([np.arange(5, dtype=np.uint64)], fraction, 0)
