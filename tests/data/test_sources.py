import gzip
import json
import os

import pytest

from jaxsft.data.rows import Bad, DataError, Row
from jaxsft.data.sources import digest, files, kind, read, scan

ROWS = [{"instruction": "你好\u2028 a", "output": 'b, "c"'}, {"instruction": "d\ne", "output": "f"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
TEXTS = {
    "a.json": json.dumps(ROWS),
    "a.jsonl": LINES,
    "a.csv": 'instruction,output\n"你好\u2028 a","b, ""c"""\n"d\ne",f\n',
}


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return str(path)


def texts(path):
    return [row.fields["text"] for row in read(path)]


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("ending", ["", ".gz", ".GZ"])
def test_a_file_or_its_gzip_gives_its_rows_and_where_they_stand(tmp_path, name, ending):
    data = TEXTS[name].encode()
    path = write(tmp_path / (name + ending), gzip.compress(data) if ending else data)
    assert [row.fields for row in read(path)] == ROWS
    assert {row.folder for row in read(path)} == {str(tmp_path)}
    assert all(row.place.startswith(f"{path} ") for row in read(path))


@pytest.mark.parametrize("how", ["cut off", "no gzip", "middle", "checksum"])
@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.gz", "a.csv.gz", "a.txt.gz", "a.parquet.gz", "a.arrow.gz"])
def test_a_broken_gzip_is_refused_by_name(tmp_path, name, how):
    rows = [f'{{"text": "{i * i}"}}' for i in range(9999)]
    text = {"a.json.gz": f"[{','.join(rows)}]", "a.csv.gz": "text\n" + "1\n" * 9999}.get(name, "\n".join(rows))
    packed = gzip.compress(text.encode())
    middle = len(packed) // 2
    data = {
        "cut off": packed[:-9],
        "no gzip": text.encode(),
        "middle": packed[:middle] + b"\xff" * 99 + packed[middle + 99 :],
        "checksum": packed[:-6] + bytes([packed[-6] ^ 1]) + packed[-5:],
    }
    with pytest.raises(DataError, match=f"{name} is no whole gzip file .*; pack it again"):
        list(scan(write(tmp_path / name, data[how])))


def test_null_is_absent(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": "a", "system": null}')
    assert next(read(path)).fields == {"text": "a"}


def test_read_stops_at_a_bad_row_and_scan_goes_on(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": "a"}\n5\n{"text": "b"}\n')
    rows = read(path)
    assert next(rows) == Row({"text": "a"}, f"{path} line 1", str(tmp_path))
    with pytest.raises(DataError, match=r'a.jsonl line 2: 5 is no row; expected an object such as \{"instruction"'):
        next(rows)
    found = list(scan(path))
    assert [isinstance(row, Bad) for row in found] == [False, True, False]


# ---- which files a path means ---------------------------------------------------------------------------------------


def test_a_folder_gives_all_it_has_inside_and_leaves_out_unknown_kinds(tmp_path):
    for name in ("b.txt", "a/c.txt", "a/d/e.jsonl"):
        write(tmp_path / name, '{"text": "e.jsonl"}' if name.endswith("l") else name)
    for name in ("README.md", "a/picture.jpg", "LICENSE", "a/x.txt.bak"):
        write(tmp_path / name, "no")
    assert texts(str(tmp_path)) == ["a/c.txt", "e.jsonl", "b.txt"]
    assert next(read(str(tmp_path))).folder == str(tmp_path / "a")


def test_a_folder_without_data_is_refused(tmp_path):
    write(tmp_path / "README.md", "no")
    with pytest.raises(DataError, match=r"is a folder without data files; it needs some that end with .json, .jsonl"):
        files(str(tmp_path))


def test_lists_and_globs_join_files(tmp_path):
    for name in ("a", "b", "deep/c"):
        write(tmp_path / f"{name}.txt", name)
    assert texts(f"{tmp_path}/*.txt") == ["a", "b"]
    assert texts(f"{tmp_path}/**/*.txt") == ["a", "b", "deep/c"]
    assert texts([f"{tmp_path}/b.txt", f"{tmp_path}/a.txt"]) == ["b", "a"]


def test_a_file_whose_name_looks_like_a_pattern(tmp_path):
    assert texts(write(tmp_path / "a[1].txt", "x")) == ["x"]


def test_a_tilde_is_the_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "a.txt", "x")
    assert texts("~/a.txt") == ["x"]


def test_a_missing_file_is_told_with_its_neighbours(tmp_path):
    write(tmp_path / "train.jsonl", "{}")
    with pytest.raises(DataError, match=r"trian.jsonl' is no file; .* holds train.jsonl. Did you mean .*/train.jsonl"):
        list(read(str(tmp_path / "trian.jsonl")))
    with pytest.raises(DataError, match=r"holds train.jsonl$"):
        list(read(str(tmp_path / "deeper" / "xyz.csv")))
    with pytest.raises(DataError, match=r"\*.csv' is no file"):
        list(read(str(tmp_path / "*.csv")))


@pytest.mark.parametrize("path", ["", "train.jsonl", "no/such/train.csv.gz"])
def test_what_is_nowhere_is_refused_and_not_looked_for_on_the_hub(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="is no file"):
        files(path)


# ---- the hub --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("org/name", ("org/name", None, "train")),
        ("name", ("name", None, "train")),
        ("org/name@main", ("org/name", "main", "train")),
        ("org/name@zh:train[:10%]", ("org/name", "zh", "train[:10%]")),
        ("org/name-1.5:test", ("org/name-1.5", None, "test")),
    ],
)
def test_hub_names_take_a_subset_and_a_split(monkeypatch, tmp_path, name, expected):
    import datasets

    asked = []

    def load_dataset(path, subset, *, split):
        asked.append((path, subset, split))
        return [{"text": "a", "system": None}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    (row,) = read(name)
    assert (row.fields, row.place) == ({"text": "a"}, f"{name} row 1")
    assert asked == [expected]


def test_a_hub_that_does_not_answer_is_told_with_the_files_here(monkeypatch, tmp_path):
    import datasets

    def load_dataset(*args, **kwargs):
        raise ConnectionError("offline\nlong story")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "train.jsonl", "{}")
    message = r"'trian' is neither on the hub \(ConnectionError: offline\) nor a file; ./ holds train.jsonl"
    with pytest.raises(DataError, match=message):
        list(read("trian"))


# ---- digests --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["b.jsonl", "deep/b.jsonl", "b.v2.jsonl", "train.2024.jsonl"])
def test_a_digest_is_of_the_content_and_not_of_name_or_time(tmp_path, name):
    first = write(tmp_path / "a.jsonl", LINES)
    other = write(tmp_path / name, LINES)
    os.utime(other, (1, 1))
    assert digest(first) == digest(other)


def test_a_digest_changes_with_content_kind_and_order(tmp_path):
    names = {"a.jsonl": LINES, "b.jsonl": LINES + "\n", "c.txt": LINES, "d/a.txt": "x", "d/b.txt": "y"}
    names |= {"e/a.txt": "y", "e/b.txt": "x", "f/a.txt": "x\ny"}
    for name, data in names.items():
        write(tmp_path / name, data)
    write(tmp_path / "g.jsonl.gz", gzip.compress(LINES.encode()))
    found = [digest(str(tmp_path / name)) for name in ("a.jsonl", "b.jsonl", "c.txt", "d", "e", "f", "g.jsonl.gz")]
    assert len(set(found)) == len(found)


def test_a_digest_of_the_hub_is_its_fingerprint(monkeypatch, tmp_path):
    import datasets

    made = {mark: datasets.Dataset.from_list([{"text": mark}]) for mark in "ab"}
    monkeypatch.chdir(tmp_path)
    found = []
    for mark in "aba":
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, mark=mark, **__: made[mark])
        found.append(digest("org/name"))
    assert (found[0] == found[2], found[0] == found[1]) == (True, False)


@pytest.mark.parametrize(
    ("name", "ending"),
    [("a.JSON", ".json"), ("a.csv.GZ", ".csv"), ("a.b.txt", ".txt"), ("a.gz", ""), ("a", ""), ("a.md", ".md")],
)
def test_a_kind_is_the_ending_in_front_of_gz(tmp_path, name, ending):
    assert kind(tmp_path / name) == ending


# ---- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", "", "a.jsonl is empty; it must hold at least one row"),
        ("a.jsonl", "\n \n", "a.jsonl is empty"),
        ("a.json", "", "a.json is empty"),
        ("a.json", " [ ] ", "a.json is empty"),
        ("a.csv", "", "a.csv is empty"),
        ("a.csv", "text\n", "a.csv is empty"),
        ("a.txt", "\n\n", "a.txt is empty"),
        ("a.txt.gz", gzip.compress(b"", mtime=0), "a.txt.gz is empty"),
        ("a.jsonl", '{"a": 1}\n{"a": \n', r"line 2, column 7: not valid JSON .*; each line must be one whole object"),
        ("a.json", '[{"a": 1}, 5]', "a.json row 2: 5 is no row; expected an object such as"),
        ("a.jsonl", '{"a": 1}\n["b"]', r'a.jsonl line 2: \["b"\] is no row; expected an object'),
        ("a.jsonl", b'{"a": 1}\n{"a": "\xff"}', "line 2: byte 0xff at offset 7 is not UTF-8; save the file as UTF-8"),
        ("a.json", b'[\n{"a": "\xff"}]', "a.json line 2: byte 0xff at offset 7 is not UTF-8"),
        ("a.json", b'[\n{"a": "' + b"x" * 3_000_000 + b'"},\n"\xc3("]', "a.json line 3: byte 0xc3 at offset 1 is not"),
        ("a.json", b'[{"a": "\xe4\xbd', "a.json line 1: byte 0xe4 at offset 8 is not UTF-8"),
        ("a.txt", "你\n".encode("gbk"), "a.txt line 1: byte 0xc4 at offset 0 is not UTF-8"),
        ("a.csv", b"text\n\xff", "a.csv line 2: byte 0xff at offset 0 is not UTF-8"),
        ("a.jsonl", '{"a": 1}\n{"a": ["\\ud83d"]}', r"line 2: \\ud83d is half of a surrogate pair; write the whole"),
        ("a.json", '[{"a": "\\ude42"}]', r"a.json row 1: \\ude42 is half of a surrogate pair"),
        ("a.json", '[{"\\ude42": 1}]', r"a.json row 1: \\ude42 is half of a surrogate pair"),
        ("a.csv", "a,b\n1,2,3\n", "a.csv line 2: the row has 3 values, the header 2; quote values that hold commas"),
        ("a.csv", 'a,b\n1,"2', "a.csv line 2: unexpected end of data; repair it, or convert the file to .jsonl"),
        ("a.csv", 'a,b\n1,"2"x\n', "a.csv line 2: .*expected after.*; repair it"),
        ("a.parquet", "no", "a.parquet is no parquet file .*; write it again"),
        ("a.arrow", "no", "a.arrow is no arrow file .*; write it again"),
        ("a.xml", "<a/>", "a.xml is of no known kind '.xml'; there are .json, .jsonl, .csv, .parquet, .arrow, .txt"),
    ],
)
def test_errors_name_file_place_and_remedy(tmp_path, name, data, message):
    path = write(tmp_path / name, data)
    with pytest.raises(DataError, match=message):
        list(read(path))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_a_whole_surrogate_pair_is_one_character(tmp_path, name):
    text = '{"a": "\\ud83d\\ude42"}'
    path = write(tmp_path / name, text if name == "a.jsonl" else f"[{text}]")
    assert next(read(path)).fields == {"a": "🙂"}
