"""Batches of images: the right pixels in the right order, from any position, whoever decodes them."""

import os
import signal
from collections import Counter, deque

import numpy as np
import pytest

from jaxsft.data import DataError, pixels
from jaxsft.data.images import Config, batches, decode, load


@pytest.fixture(scope="module")
def rows(folder, preprocess):
    return load(Config(train=str(folder / "classes")), preprocess).train


@pytest.fixture(scope="module")
def apart(folder, preprocess):
    """The same, decoded in two processes."""
    found = load(Config(train=str(folder / "classes"), workers=2), preprocess).train
    yield found
    found.pool.close()


def stream(rows, size=5, seed=3, epochs=2, **how):
    return list(batches(rows, size, seed=seed, epochs=epochs, **how))


def same(one, two) -> bool:
    return one[1:] == two[1:] and all(np.array_equal(a, b) for a, b in zip(one.tokens[:4], two.tokens[:4], strict=True))


def test_each_row_has_its_own_pixels_and_label(rows, preprocess):
    for batch in stream(rows):
        for picture, (label,), (row,) in zip(*batch.tokens[:3], strict=True):
            if row < 0:
                assert not picture.any()
                assert label == 0
                continue
            alone = pixels.apply(preprocess, decode(rows.pictures[row].path))
            assert np.array_equal(picture, alone)
            assert rows.pictures[row].label == ("ant", "bee", "cat")[label]


def test_every_image_comes_once_an_epoch_in_another_order(rows):
    found = stream(rows)
    numbers = np.concatenate([batch.tokens.row[:, 0] for batch in found])
    assert Counter(numbers.tolist()) == {**dict.fromkeys(range(12), 2), -1: 1}
    assert numbers[:12].tolist() != numbers[12:24].tolist()
    assert [batch.count for batch in found] == [5, 5, 5, 5, 4]
    assert np.concatenate([batch.tokens.turn[:, 0] for batch in found]).tolist() == list(range(25))


def test_a_stream_goes_on_at_any_position(rows):
    whole = stream(rows)
    for at, batch in enumerate(whole[:-1]):
        rest = stream(rows, position=batch.position)
        assert len(rest) == len(whole) - at - 1
        assert all(map(same, rest, whole[at + 1 :]))


def test_processes_give_what_threads_give_and_take_over_positions(rows, apart):
    whole = stream(rows)
    assert all(map(same, stream(apart), whole))
    assert all(map(same, stream(apart, position=whole[1].position), whole[2:]))


def test_two_hosts_share_a_batch(rows):
    whole = stream(rows, size=6)
    parts = [stream(rows, size=6, process=i, processes=2) for i in range(2)]
    for batch, *shares in zip(whole, *parts, strict=True):
        for name in ("pixels", "label", "row", "turn"):
            joined = np.concatenate([getattr(one.tokens, name) for one in shares])
            assert np.array_equal(joined, getattr(batch.tokens, name))


def test_another_set_is_refused(rows, folder, preprocess):
    position = next(batches(rows, 4, seed=0, epochs=1)).position
    other = load(Config(train=str(folder / "classes"), val_fraction=0.3), preprocess).train
    with pytest.raises(DataError, match="not that of the checkpoint"):
        next(batches(other, 4, seed=0, epochs=1, position=position))


def test_some_images_spread_over_all(rows):
    assert rows.some(99) is rows
    assert [rows.pictures.index(one) for one in rows.some(4).pictures] == [0, 4, 7, 11]
    assert rows.some(4).digest != rows.digest


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_breaks_while_it_is_decoded_ends_the_run_with_its_row(folder, preprocess, tmp_path, workers):
    file = tmp_path / "rows.jsonl"
    lines = (folder / "rows.jsonl").read_text().replace("classes/", f"{folder}/classes/")
    file.write_text(lines + '{"image_path": "broken.jpg", "label": "ant"}\n')
    broken = tmp_path / "broken.jpg"
    decode(str(folder / "classes/ant/0.png")).resize((200, 200)).save(broken)
    broken.write_bytes(broken.read_bytes()[:2000])
    rows = load(Config(train=str(file), check="bytes", workers=workers), preprocess).train
    try:
        with pytest.raises(DataError, match=r"rows.jsonl line 13 \(.*broken.jpg\): it is broken .*truncated"):
            stream(rows, epochs=1)
    finally:
        rows.pool.close()


def test_a_process_that_is_killed_is_noticed_and_replaced(apart):
    found = batches(apart, 2, seed=0, epochs=None)
    next(found)
    for process in list(apart.pool._executor._processes.values()):  # type: ignore[union-attr]
        os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(DataError, match="one of 2 processes that decode images was killed.*data.workers"):
        deque(found, maxlen=0)
    assert len(stream(apart, epochs=1)) == 3  # new processes


def test_a_negative_number_of_processes_is_refused(folder, preprocess):
    with pytest.raises(DataError, match="data.workers is -1"):
        load(Config(train=str(folder / "classes"), workers=-1), preprocess)
