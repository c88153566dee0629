"""Rows, folders of classes and data sets give the same pictures."""

import csv
import os
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest

from jaxsft.data import DataError
from jaxsft.data.images import decode, find
from jaxsft.data.images.sources import content

from .conftest import draw

NAMES = ["ant", "bee", "cat"]


def shown(found) -> set:
    """What pictures show, and their labels."""
    return {(np.asarray(decode(content(one, found.tables))).tobytes(), one.label) for one in found.pictures}


@pytest.fixture(scope="module")
def wanted() -> set:
    return {(np.asarray(draw(i)).tobytes(), NAMES[i % 3]) for i in range(12)}


@pytest.fixture(scope="module")
def table(folder):
    files = [str(folder / "classes" / NAMES[i % 3] / f"{i}.png") for i in range(12)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
    return datasets.Dataset.from_dict({"image": files, "label": [i % 3 for i in range(12)]}, features)


def test_rows_and_folders(folder, wanted):
    by_row, by_folder = find([str(folder / "rows.jsonl")]), find([str(folder / "classes")])
    assert shown(by_row) == shown(by_folder) == wanted
    assert by_row.pictures[0].place.endswith("rows.jsonl line 1 (" + str(folder / "classes/ant/0.png") + ")")


def test_csv_with_other_columns_and_whole_numbers(folder):
    with (folder / "rows.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["file_name", "kind"], ["classes/ant/0.png", 7], ["classes/bee/1.png", 10]])
    found = find([str(folder / "rows.csv")], {"image_path": "file_name", "label": "kind"})
    assert [one.label for one in found.pictures] == ["7", "10"]


def test_a_data_set_on_disk(table, wanted, tmp_path):
    table.save_to_disk(tmp_path / "set")
    assert shown(find([str(tmp_path / "set")])) == wanted


def test_parquet_that_holds_the_files(table, wanted, tmp_path, monkeypatch):
    monkeypatch.setenv("JAXSFT_CACHE", str(tmp_path / "cache"))
    embedded = table.cast_column("image", datasets.Image(decode=False)).map(
        lambda row: {"image": {"bytes": Path(row["image"]["path"]).read_bytes(), "path": None}}
    )
    embedded.cast_column("image", datasets.Image()).rename_column("label", "kind").to_parquet(tmp_path / "set.parquet")
    found = find([str(tmp_path / "set.parquet")])  # a ClassLabel is the label, whatever it is called
    assert shown(found) == wanted
    assert found.pictures[3].place.endswith("set.parquet row 4")


def test_a_set_of_several_splits_asks_for_one(table, tmp_path):
    datasets.DatasetDict({"train": table, "test": table}).save_to_disk(tmp_path / "sets")
    with pytest.raises(DataError, match="several splits; give one: .*sets/test, .*sets/train"):
        find([str(tmp_path / "sets")])


def test_a_set_without_labels(table, tmp_path):
    table.remove_columns("label").save_to_disk(tmp_path / "set")
    with pytest.raises(DataError, match="has no column 'label'; it has image"):
        find([str(tmp_path / "set")])
    table.rename_column("label", "coarse").save_to_disk(tmp_path / "named")
    with pytest.raises(DataError, match="has no column 'fine'; it has image, coarse"):
        find([str(tmp_path / "named")], {"label": "fine"})


def test_labels_of_a_set_that_are_missing_are_bad_rows(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    rows = {"image": [draw(0), draw(1)], "label": [1, None]}
    datasets.Dataset.from_dict(rows, features).save_to_disk(tmp_path / "set")
    found = find([str(tmp_path / "set")])
    assert [one.label for one in found.pictures] == ["b"]
    assert str(found.bad[0]).endswith("set row 2: label is None; expected a string or a whole number")


def test_a_bad_row_says_where(folder):
    file = folder / "bad.jsonl"
    file.write_text('{"image_path": "classes/ant/0.png", "label": "ant"}\n{"image_path": "x.png", "label": 1.5}\nno\n')
    found = find([str(file)])
    assert [str(one).split("bad.jsonl ")[1].split(";")[0] for one in found.bad] == [
        "line 2: label is 1.5",
        "line 3, column 1: not valid JSON (Expecting value)",
    ]


def test_folders_of_folders_ask_for_one(folder, tmp_path):
    for name in ("train", "test"):
        shutil.copytree(folder / "classes", tmp_path / name)
    with pytest.raises(DataError, match=r"folders of folders with pictures \(test, train\); give one, as .*test"):
        find([str(tmp_path)])


def test_what_is_no_picture_in_a_folder_of_pictures_is_left_alone(folder, tmp_path):
    shutil.copytree(folder / "classes", tmp_path / "own")
    (tmp_path / "own" / "ant" / "notes.txt").write_text("mine")
    (tmp_path / "own" / ".cache").mkdir()
    assert len(find([str(tmp_path / "own")]).pictures) == 12


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_folder_that_may_not_be_read(folder, tmp_path):
    shutil.copytree(folder / "classes", tmp_path / "own")
    (tmp_path / "own" / "bee").chmod(0)
    try:
        with pytest.raises(DataError, match=r"the folder .*bee cannot be read \(Permission denied\)"):
            find([str(tmp_path / "own")])
    finally:
        (tmp_path / "own" / "bee").chmod(0o700)


def test_a_folder_that_cannot_be_listed_is_an_error_and_not_empty(folder, tmp_path, monkeypatch):
    """As above, for whoever may read everything: the system refuses deep inside a class."""
    shutil.copytree(folder / "classes", tmp_path / "own")
    (tmp_path / "own" / "bee" / "deep").mkdir()
    real = os.scandir

    def scandir(path="."):
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(DataError, match=r"deep cannot be read \(Permission denied\)"):
        find([str(tmp_path / "own")])


def test_a_path_that_is_nothing(folder):
    with pytest.raises(DataError, match="is no file; .*Did you mean .*rows.jsonl"):
        find([str(folder / "row.jsonl")])
