import dataclasses
import json
from collections import Counter
from itertools import islice, pairwise

import numpy as np
import pytest

from jaxsft.data import DataError, Example, batches, in_memory, steps_per_epoch
from jaxsft.data.pack import plan

from .conftest import documents

SEEDS = 7


def split(batch):
    """The rows of a batch."""
    return [type(batch.tokens)(*arrays) for arrays in zip(*batch.tokens, strict=True)]


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a.tokens, b.tokens, strict=True)) and a[1:] == b[1:]


@pytest.fixture(scope="module")
def rows():
    """23 short documents in rows of two or so."""
    made = [Example(np.full(i % 5 + 2, i + 1, np.int32), np.arange(i % 5 + 2) > 0) for i in range(23)]
    order, rows = plan(np.array([len(d.ids) for d in made]), 8)
    return in_memory(made, 8, [order[a:b] for a, b in pairwise(rows)])


def test_packed_rows_are_a_sequence(rows):
    assert len(list(rows)) == len(rows)
    assert np.array_equal(rows[-1].tokens, rows[len(rows) - 1].tokens)
    with pytest.raises(IndexError):
        rows[len(rows)]


@pytest.mark.parametrize("seed", [None, SEEDS])
@pytest.mark.parametrize("epochs", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 4, 64])
def test_a_finite_stream_shows_each_document_so_many_times(rows, seed, epochs, size):
    found = list(batches(rows, size, seed=seed, epochs=epochs))
    seen = Counter(document for batch in found for document in documents(split(batch)))
    assert seen == Counter(dict.fromkeys(documents(rows), epochs))
    assert {batch.tokens.tokens.shape for batch in found} == {(size, 8)}
    assert len(found) == -(-epochs * len(rows) // size)
    assert sum(batch.count for batch in found) == epochs * len(rows.sources[0].ids)
    if epochs == 1:
        assert len(found) == steps_per_epoch(rows, size)


def test_without_a_seed_rows_come_as_they_lie(rows):
    found = [row for batch in batches(rows, 4, seed=None, epochs=1) for row in split(batch)]
    assert documents(found) == documents(rows)
    assert not any(row.mask.any() or row.segments.any() for row in found[len(rows) :])


def test_each_epoch_has_its_own_order_and_a_seed_repeats_it(rows):
    def order(seed):
        found = islice(batches(rows, 1, seed=seed, epochs=None), 3 * len(rows))
        tokens = [batch.tokens.tokens.tobytes() for batch in found]
        return [tokens[i : i + len(rows)] for i in range(0, len(tokens), len(rows))]

    first = order(SEEDS)
    assert Counter(first[0]) == Counter(first[1]) == Counter(first[2])
    assert first[0] != first[1] != first[2]
    assert order(SEEDS) == first
    assert order(SEEDS + 1)[0] not in first


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_processes_share_each_batch_in_order(rows, processes):
    for epochs in (1, 2):
        whole = list(batches(rows, 4, seed=SEEDS, epochs=epochs))
        shares = [
            list(batches(rows, 4, seed=SEEDS, epochs=epochs, process=p, processes=processes)) for p in range(processes)
        ]
        assert {len(share) for share in shares} == {len(whole)}
        for batch, *parts in zip(whole, *shares, strict=True):
            joined = [np.concatenate(arrays) for arrays in zip(*(part.tokens for part in parts), strict=True)]
            assert all(np.array_equal(x, y) for x, y in zip(batch.tokens, joined, strict=True))
            assert batch.count == sum(part.count for part in parts)
            assert all(part.position == batch.position for part in parts)


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("epochs", [2, None])
def test_resuming_after_any_batch_is_as_if_never_stopped(rows, processes, epochs):
    for process in range(processes):
        share = {"seed": SEEDS, "epochs": epochs, "process": process, "processes": processes}
        whole = list(islice(batches(rows, 4, **share), 9))
        for at, batch in enumerate(whole):
            position = json.loads(json.dumps(batch.position))
            rest = list(islice(batches(rows, 4, **share, position=position), len(whole) - at - 1))
            assert len(rest) == len(whole) - at - 1
            assert all(same(a, b) for a, b in zip(rest, whole[at + 1 :], strict=True))


def test_a_batch_must_divide_by_the_processes(rows):
    with pytest.raises(DataError, match=r"train.batch_size is 3; it must be a multiple of the 2 processes"):
        batches(rows, 3, seed=None, epochs=1, processes=2)
    with pytest.raises(DataError, match=r"train.batch_size is 0"):
        batches(rows, 0, seed=None, epochs=1)


def test_a_position_in_other_data_is_refused(rows):
    position = next(batches(rows, 4, seed=SEEDS, epochs=None)).position
    other = in_memory([Example(np.arange(3), np.arange(3) > 0)], 8)
    changed = dataclasses.replace(rows, digest="other")
    assert next(batches(other, 1, seed=None, epochs=None, position=position)).position["next_index"] == 2  # same digest
    with pytest.raises(DataError, match=r"the data is not that of the checkpoint: .* has changed since; restore it"):
        batches(changed, 4, seed=SEEDS, epochs=None, position=position)
