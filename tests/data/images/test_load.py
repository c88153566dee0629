"""What is learned and what is held out; labels; and what is said of images that cannot be used."""

import json
from collections import Counter

import numpy as np
import pytest

from jaxsft.data import DataError
from jaxsft.data.images import Config, load
from jaxsft.data.images.labels import balanced, choose, names, read, save
from jaxsft.data.images.split import stratified

from .conftest import draw


def write(file, rows) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


@pytest.fixture
def pictures(tmp_path):
    """pictures([(7, "ant"), ...]): rows of drawings by number, saved as the ending says."""

    def make(rows, name="rows.jsonl") -> str:
        lines = []
        for at, (number, label, *ending) in enumerate(rows):
            path = f"{name}-{at}.{(ending or ['png'])[0]}"
            draw(number).save(tmp_path / path)
            lines.append({"image_path": path, "label": label})
        return write(tmp_path / name, lines)

    return make


def test_labels_in_order_of_text_or_by_value():
    assert names(["b", "a", "C"]) == ("C", "a", "b")
    assert names(["10", "9", "-1", "9"]) == ("-1", "9", "10")
    assert names(["10", "9", "x"]) == ("10", "9", "x")
    assert choose(["b", "a"], ["b", "a"]) == ("b", "a")
    assert choose(["b", "a"], ["b", "a", "c"]) == ("a", "b")
    with pytest.raises(DataError, match="all images have the label 'a'"):
        choose(["a", "a"])


def test_classes_are_kept(tmp_path):
    save(tmp_path, ("a", "β"))
    assert read(tmp_path) == ("a", "β")


def test_balanced_weights_are_those_of_scikit_learn():
    labels = np.array([0, 0, 0, 0, 0, 0, 1, 1, 2])
    by_hand = [9 / (3 * n) for n in (6, 2, 1)]
    assert np.allclose(balanced(labels, 3), by_hand)
    assert np.isclose(balanced(labels, 3)[labels].mean(), 1)


@pytest.mark.parametrize("seed", range(3))
def test_a_share_of_each_class_and_all_copies_on_one_side(seed):
    labels = np.repeat([0, 1, 2, 3], [40, 20, 2, 1])
    hashes = np.arange(63, dtype=np.uint64)
    hashes[10:20] = hashes[0]  # eleven copies of one image
    held, lone = stratified(labels, hashes, 0.2, seed)
    assert not set(hashes[held]) & set(hashes[~held])
    different = {k: len(set(hashes[held & (labels == k)])) for k in range(4)}
    assert different == {0: 6, 1: 4, 2: 1, 3: 0}  # of 30, 20, 2 and 1 different ones
    assert lone.tolist() == [3]
    assert np.array_equal(held, stratified(labels, hashes, 0.2, seed)[0])


def test_a_copy_in_another_class_stays_on_the_side_of_the_first():
    labels, hashes = np.array([0, 0, 1, 1, 1]), np.array([1, 2, 2, 3, 4], np.uint64)
    for seed in range(8):
        held, _ = stratified(labels, hashes, 0.4, seed)
        assert held[1] == held[2]


def test_copies_are_found_whatever_they_are_saved_as(pictures, preprocess):
    path = pictures([(0, "a"), (0, "a", "bmp"), (1, "a"), (2, "b"), (2, "b", "tif"), (3, "b")])
    by_pixels = load(Config(train=path, val_fraction=0.5), preprocess)
    assert by_pixels.report.copies == 2
    sides = [{tuple(one.path.split(".jsonl-")[1][0] for one in rows.pictures)} for rows in by_pixels[:2]]
    for side in sides:
        (files,) = side
        assert ("0" in files) == ("1" in files)
        assert ("3" in files) == ("4" in files)
    assert load(Config(train=path, check="bytes"), preprocess).report.copies == 0


def test_a_split_is_that_of_the_seed(pictures, preprocess):
    path = pictures([(i, "ab"[i % 2]) for i in range(20)])
    held = lambda seed: [
        one.path for one in load(Config(train=path, val_fraction=0.3, seed=seed), preprocess).eval.pictures
    ]  # type: ignore
    assert held(0) == held(0) != held(1)


def test_the_report_of_a_class_with_one_image(pictures, preprocess):
    loaded = load(Config(train=pictures([(0, "a"), (1, "a"), (2, "b")]), val_fraction=0.5), preprocess)
    assert loaded.report.lone == ["b"]
    assert ("nothing held out of", "b, which have one image") in loaded.report.lines()
    assert Counter(loaded.train.labels.tolist()) == {0: 1, 1: 1}


def test_contradictions_and_images_on_both_sides_are_told(pictures, preprocess):
    train = pictures([(0, "a"), (1, "a"), (1, "b"), (2, "b")])
    held = pictures([(0, "a"), (5, "b")], "held.jsonl")
    report = load(Config(train=train, eval=held), preprocess).report
    assert (report.contradicting, report.crossing, report.copies) == (1, 1, 2)
    told = dict(report.lines())
    assert told["learned and measured"] == "1 images of data.eval are in data.train, too"


def test_a_label_that_nobody_learned_names_its_row(pictures, preprocess):
    train, held = pictures([(0, "a"), (1, "b")]), pictures([(2, "b"), (3, "zebra")], "held.jsonl")
    with pytest.raises(DataError, match=r"held.jsonl line 2 .*label 'zebra' is none of the 2 classes a, b; mend it"):
        load(Config(train=train, eval=held), preprocess)
    with pytest.raises(DataError, match="label 'b' is none of the 2 classes a, c"):
        load(Config(train=train), preprocess, classes=("a", "c"))


def test_images_that_cannot_be_used_are_listed_or_left_out(pictures, preprocess, tmp_path):
    path = pictures([(0, "a"), (1, "b"), (2, "b"), (3, "a")])
    (tmp_path / "rows.jsonl-1.png").write_text("no picture")
    (tmp_path / "rows.jsonl-2.png").unlink()
    for check in ("pixels", "bytes"):
        with pytest.raises(
            DataError, match=r"2 rows cannot be used:\n.*line 2 .*no picture.*\n.*line 3 .*no such file"
        ):
            load(Config(train=path, check=check), preprocess)
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"image_path": "rows.jsonl-0.png", "label": "b"}\n')
    loaded = load(Config(train=path, on_bad_row="skip"), preprocess)
    assert (loaded.report.images, loaded.report.dropped) == (3, 2)
    assert "line 3" in loaded.report.bad[1]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({}, "data.train is empty"),
        ({"train": "x", "eval": "y", "val_fraction": 0.1}, "both given"),
        ({"train": "x", "max_pixels": 10**9}, "data.max_pixels is 1,000,000,000"),
    ],
)
def test_settings_that_cannot_be(config, words, preprocess):
    with pytest.raises(DataError, match=words):
        load(Config(**config), preprocess)


def test_the_checkpoints_classes_keep_their_order(pictures, preprocess):
    loaded = load(Config(train=pictures([(0, "a"), (1, "b")]), class_weights="balanced"), preprocess, known=("b", "a"))
    assert loaded.classes == ("b", "a")
    assert loaded.train.labels.tolist() == [1, 0]
    assert loaded.weights is not None
