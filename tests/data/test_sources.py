import json

import pytest

from jaxsft.data.sources import DataError, Row, read

ROWS = [{"instruction": "你好\u2028 a", "output": 'b, "c"'}, {"instruction": "d\ne", "output": "f"}]


def write(path, data):
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return str(path)


def test_json_is_an_array(tmp_path):
    path = write(tmp_path / "a.json", json.dumps(ROWS, indent=1))
    assert read(path) == [Row(ROWS[0], f"{path} row 1"), Row(ROWS[1], f"{path} row 2")]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_jsonl_is_a_line_each_and_blank_lines_count_for_places_only(tmp_path, end, mark):
    lines = [json.dumps(row, ensure_ascii=False) for row in ROWS]
    path = write(tmp_path / "a.jsonl", mark + end.join([lines[0], "", lines[1], ""]))
    assert read(path) == [Row(ROWS[0], f"{path} line 1"), Row(ROWS[1], f"{path} line 3")]


def test_csv_has_a_header_and_quotes(tmp_path):
    path = write(tmp_path / "a.csv", 'instruction,output\nhi,"b, ""c"""\n\n"d\ne",\n')
    assert read(path) == [
        Row({"instruction": "hi", "output": 'b, "c"'}, f"{path} line 2"),
        Row({"instruction": "d\ne", "output": ""}, f"{path} line 5"),
    ]


def test_parquet_drops_nulls(tmp_path):
    import pyarrow
    import pyarrow.parquet

    path = str(tmp_path / "a.parquet")
    table = {"text": ["a", "b"], "history": [None, [["q", "a"]]]}
    pyarrow.parquet.write_table(pyarrow.table(table), path)
    assert read(path) == [
        Row({"text": "a"}, f"{path} row 1"),
        Row({"text": "b", "history": [["q", "a"]]}, f"{path} row 2"),
    ]


def test_txt_is_a_document_a_line(tmp_path):
    path = write(tmp_path / "a.txt", "one\r\n\n 二\u2028 \n")
    assert read(path) == [Row({"text": "one"}, f"{path} line 1"), Row({"text": " 二\u2028 "}, f"{path} line 3")]


def test_null_is_absent(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": "a", "system": null}')
    assert read(path)[0].fields == {"text": "a"}


def test_lists_and_globs_join_files(tmp_path):
    for name in "ab":
        write(tmp_path / f"{name}.txt", name)
    texts = lambda path: [row.fields["text"] for row in read(path)]
    assert texts(str(tmp_path / "*.txt")) == ["a", "b"]
    assert texts([str(tmp_path / "b.txt"), str(tmp_path / "a.txt")]) == ["b", "a"]


def test_a_file_whose_name_looks_like_a_pattern(tmp_path):
    assert read(write(tmp_path / "a[1].txt", "x"))[0].fields == {"text": "x"}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("org/name", ("org/name", None, "train")),
        ("name", ("name", None, "train")),
        ("org/name@main", ("org/name", "main", "train")),
        ("org/name@zh:train[:10%]", ("org/name", "zh", "train[:10%]")),
        ("org/name:test", ("org/name", None, "test")),
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
    assert read(name) == [Row({"text": "a"}, f"{name} row 1")]
    assert asked == [expected]


def test_a_hub_that_does_not_answer_is_told_with_the_files_here(monkeypatch, tmp_path):
    import datasets

    def load_dataset(*args, **kwargs):
        raise ConnectionError("offline\nlong story")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "train.jsonl", "{}")
    with pytest.raises(
        DataError, match=r"'trian' is neither on the hub \(ConnectionError: offline\) nor a file; ./ holds"
    ):
        read("trian")


def test_a_missing_file_is_told_with_its_neighbours(tmp_path):
    write(tmp_path / "train.jsonl", "{}")
    with pytest.raises(
        DataError, match=r"trian.jsonl' is no file; .* holds train.jsonl. Did you mean .*/train.jsonl\?"
    ):
        read(str(tmp_path / "trian.jsonl"))
    with pytest.raises(DataError, match=r"holds train.jsonl$"):
        read(str(tmp_path / "deeper" / "xyz.csv"))
    with pytest.raises(DataError, match=r"is no file but a folder; name the files in it, such as .*/\*.jsonl"):
        read(str(tmp_path))
    with pytest.raises(DataError, match=r"\*.csv' is no file"):
        read(str(tmp_path / "*.csv"))


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", "", "a.jsonl is empty; it must hold at least one row"),
        ("a.jsonl", "\n \n", "a.jsonl is empty"),
        ("a.json", "", "a.json is empty"),
        ("a.json", "[]", "a.json is empty"),
        ("a.csv", "", "a.csv is empty"),
        ("a.csv", "text\n", "a.csv is empty"),
        ("a.txt", "\n\n", "a.txt is empty"),
        (
            "a.jsonl",
            '{"a": 1}\n{"a": \n',
            r"a.jsonl line 2, column 7: not valid JSON .*; each line must be one whole object",
        ),
        ("a.json", '[\n{"a": 1},\n{"a": x}\n]', r"a.json line 3, column 7: not valid JSON \(Expecting value\); repair"),
        (
            "a.json",
            '{"a": 1}\n{"a": 2}',
            r"a.json line 2, column 1: not valid JSON \(Extra data\).*name the file .jsonl",
        ),
        ("a.json", '{"a": 1}', "a.json holds one dict; expected an array of objects"),
        ("a.json", '[{"a": 1}, 5]', "a.json row 2 is 5; expected an object such as"),
        ("a.jsonl", '{"a": 1}\n["b"]', r'a.jsonl line 2 is \["b"\]; expected an object'),
        (
            "a.jsonl",
            b'{"a": 1}\n{"a": "\xff"}',
            "a.jsonl line 2: byte 0xff at offset 16 is not UTF-8; save the file as",
        ),
        ("a.json", b'[\n{"a": "\xff"}]', "a.json line 2: byte 0xff at offset 9 is not UTF-8"),
        ("a.txt", "你\n".encode("gbk"), "a.txt line 1: byte 0xc4 at offset 0 is not UTF-8"),
        ("a.csv", b"text\n\xff", "a.csv line 2: byte 0xff at offset 5 is not UTF-8"),
        (
            "a.jsonl",
            '{"a": 1}\n{"a": ["\\ud83d"]}',
            r"a.jsonl line 2 has \\ud83d, half of a surrogate pair; write the whole",
        ),
        ("a.json", '[{"a": "\\ude42"}]', r"a.json row 1 has \\ude42, half of a surrogate pair"),
        ("a.csv", "a,b\n1,2,3\n", "a.csv line 2 has 3 values, the header 2; quote those with commas"),
        ("a.csv", 'a,b\n1,"2', "a.csv line 2: unexpected end of data; repair it, or convert the file to .jsonl"),
        ("a.parquet", "no", "a.parquet is no parquet file .*; write it again"),
        ("a.xml", "<a/>", "a.xml is of no known kind '.xml'; there are .json, .jsonl, .csv, .parquet, .txt"),
    ],
)
def test_errors_name_file_place_and_remedy(tmp_path, name, data, message):
    path = write(tmp_path / name, data)
    with pytest.raises(DataError, match=message):
        read(path)


def test_a_whole_surrogate_pair_is_one_character(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"a": "\\ud83d\\ude42"}')
    assert read(path)[0].fields == {"a": "🙂"}
