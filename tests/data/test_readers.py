"""Kinds of files, against json.load, csv and pyarrow."""

import csv
import gzip
import io
import json
import random

import pyarrow
import pyarrow.parquet
import pytest

from jaxsft.data.readers import PIECE
from jaxsft.data.rows import Bad, DataError, Row
from jaxsft.data.sources import read, scan

# What json may write, told apart by how it breaks where a window ends.
NASTY = (
    '{"a": "\\"\\\\\\u4f60\\ud83d\\ude42 \u4f60🙂\u2028\\/", "b\\n": [1.5e+10, -0.25, 1E5, 12345678901234567890, true],'
    ' "c": {"d": {}, "e": [], "f": [[null, false]]}, "nan": NaN, "inf": -Infinity,      "g": ""  }'
)


def write(path, data):
    data = data if isinstance(data, bytes) else data.encode("utf-8")
    path.write_bytes(gzip.compress(data, 1) if path.suffix == ".gz" else data)
    return str(path)


def fields(path):
    return [row.fields for row in read(path)]


def without_nulls(rows):
    return [{key: value for key, value in row.items() if value is not None} for row in rows]


# ---- json -----------------------------------------------------------------------------------------------------------


def test_a_json_value_may_lie_across_the_end_of_a_window_at_every_character(tmp_path):
    second = ',\n {"z": 1}]'
    for inside in range(len(NASTY) + 4):
        head = '[{"x": "'
        pad = "y" * (PIECE - len(head) - len('"}, ') - inside)
        text = f'{head}{pad}"}}, {NASTY}{second}'
        assert repr(fields(write(tmp_path / "a.json", text))) == repr(json.loads(text))  # NaN is not equal to itself


@pytest.mark.parametrize("name", ["a.json", "a.json.gz"])
@pytest.mark.parametrize("indent", [None, 1, 90])
def test_json_larger_than_several_windows_is_what_json_load_reads(tmp_path, name, indent):
    draw = random.Random(0)
    words = ["x" * 300, "你好" * 200, '"\\', "🙂", "\u2028", "\n\r\t", "\x00"]
    rows = [{"n": i, "t": [{"w": draw.choice(words)} for _ in range(draw.randrange(9))]} for i in range(3000)]
    path = write(tmp_path / name, json.dumps(rows, indent=indent, ensure_ascii=bool(indent)))
    found = list(read(path))
    assert [row.fields for row in found] == rows
    assert [row.place for row in found] == [f"{path} row {i + 1}" for i in range(len(rows))]


def test_one_json_value_may_be_larger_than_several_windows(tmp_path):
    rows = [{"a": "\u4f60" * (3 * PIECE)}, {"b": list(range(400_000))}, {"c": 1}]
    assert fields(write(tmp_path / "a.json", json.dumps(rows, ensure_ascii=False))) == rows


@pytest.mark.parametrize("number", ["12345", "-1.5", "1.5e-3", "0.0"])
def test_a_number_in_a_rows_place_is_bad_as_a_whole_wherever_the_window_ends(tmp_path, number):
    for inside in range(len(number) + 2):
        text = "[" + '{"x": "' + "y" * (PIECE - 11 - inside) + '"}, ' + number + ', {"a": 1}]'
        path = write(tmp_path / "a.json", text)
        _, bad, good = scan(path)
        assert str(bad).startswith(f"{path} row 2: {json.loads(number)} is no row")
        assert good.fields == {"a": 1}


@pytest.mark.parametrize("cut", [1, 2, 5, 40])
@pytest.mark.parametrize("size", [10, PIECE // 100])
def test_a_truncated_json_file_gives_its_whole_rows_and_then_says_where_it_breaks(tmp_path, cut, size):
    rows = [{"a": "x" * 100, "b": i} for i in range(size)]
    text, found = json.dumps(rows, indent=0)[:-cut], []
    with pytest.raises(DataError, match=rf"line {text.count(chr(10)) + 1}, column \d+: not valid JSON .*; repair it"):
        found.extend(row.fields for row in scan(write(tmp_path / "a.json", text)))
    assert found == rows[: text.count("}")]


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ('[\n{"a": 1},\n{"a": x}\n]', "line 3, column 7: not valid JSON .Expecting value."),
        ('[{"a": 1}\n{"a": 2}]', "line 2, column 1: not valid JSON .Expecting ',' delimiter."),
        ('[{"a": 1},]', "line 1, column 11: not valid JSON .Expecting value."),
        ('[{"a": 1}] x', "line 1, column 12: not valid JSON .Extra data."),
        ('[{"a": 1}]\n[{"a": 2}]', "line 2, column 1: not valid JSON .Extra data."),
        ('{"a": 1}\n{"a": 2}', "line 2, column 1: not valid JSON .Extra data.*name the file .jsonl"),
        ('[{"a": "\n"}]', "line 1, column 9: not valid JSON .Invalid control character at"),
        ('[{"a": "\\x"}]', "line 1, column 9: not valid JSON"),
        ("[" + "\n" * 2 * PIECE + "{]", f"line {2 * PIECE + 1}, column 2: not valid JSON"),
        ('[{"a": "' + "y" * 2 * PIECE + '"}, x]', f"line 1, column {2 * PIECE + 13}: not valid JSON"),
        ("[" * 100_000, "not valid JSON|nest"),
        ('[{"a": ' + "1" * 5000 + "}]", "a.json.*(digits|integer)"),
    ],
    ids=range(12),
)
def test_malformed_json_says_where(tmp_path, text, place):
    path = write(tmp_path / "a.json", text)
    with pytest.raises(DataError, match=place):
        list(scan(path))


@pytest.mark.parametrize(("value", "kind"), [('{"a": 1}', "dict"), ('"x"', "str"), ("3", "int"), (" null\n", "None")])
def test_json_that_is_no_array_is_told_what_it_holds(tmp_path, value, kind):
    with pytest.raises(DataError, match=f"a.json holds one {kind}.*; expected an array of objects"):
        list(scan(write(tmp_path / "a.json", value)))


# ---- jsonl ----------------------------------------------------------------------------------------------------------


def test_bad_lines_of_jsonl_have_their_numbers_and_reading_goes_on(tmp_path):
    bad = {2: b'{"a": ', 4: b"\xff\xfe", 6: b"[1]", 8: b'{"a": "\\ud83d"}', 9: b"[" * 100_000, 11: b'{"a": 1} x'}
    bad |= {13: b'{"a": ' + b"1" * 5000 + b"}"}
    lines = [bad.get(number, b"" if number == 7 else b'{"n": %d}' % number) for number in range(1, 15)]
    path = write(tmp_path / "a.jsonl", b"\n".join(lines))
    found = list(scan(path))
    assert [row.fields["n"] for row in found if isinstance(row, Row)] == [1, 3, 5, 10, 12, 14]
    told = [row for row in found if isinstance(row, Bad)]
    for number, row in zip(bad, told, strict=True):
        assert row.place.split(", column")[0] == f"{path} line {number}"
    with pytest.raises(DataError, match="a.jsonl line 2, column 7: not valid JSON"):
        list(read(path))


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_jsonl_is_a_line_each_and_blank_lines_count_for_places_only(tmp_path, end, mark):
    rows = [{"a": "你好\u2028 a\u0085", "b": 'b, "c"'}, {"a": "d\ne", "b": "f\r"}]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path = write(tmp_path / "a.jsonl", mark + end.join([lines[0], "", lines[1], " "]))
    assert list(read(path)) == [
        Row(rows[0], f"{path} line 1", str(tmp_path)),
        Row(rows[1], f"{path} line 3", str(tmp_path)),
    ]


# ---- csv and txt ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_csv_is_what_csv_writes(tmp_path, end):
    draw, text = random.Random(0), io.StringIO()
    rows = [{"a": "".join(draw.choices('x,"\n 你', k=9)), "b": "".join(draw.choices("y'\t;", k=4))} for _ in range(99)]
    writer = csv.DictWriter(text, ["a", "b"], lineterminator=end)
    writer.writeheader()
    writer.writerows(rows)
    assert fields(write(tmp_path / "a.csv", "\ufeff" + text.getvalue())) == rows


def test_a_bad_row_of_csv_has_its_line_and_reading_goes_on(tmp_path):
    path = write(tmp_path / "a.csv", 'a,b\n1,2,3\n"x\ny",z\n\n4\n5,6\n')
    assert list(scan(path)) == [
        Bad(f"{path} line 2", "the row has 3 values, the header 2; quote values that hold commas"),
        Row({"a": "x\ny", "b": "z"}, f"{path} line 4", str(tmp_path)),
        Bad(f"{path} line 6", "the row has 1 values, the header 2; quote values that hold commas"),
        Row({"a": "5", "b": "6"}, f"{path} line 7", str(tmp_path)),
    ]


def test_a_field_of_csv_may_be_huge(tmp_path):
    assert fields(write(tmp_path / "a.csv", "a,b\n" + "x" * 3_000_000 + ",y\n")) == [{"a": "x" * 3_000_000, "b": "y"}]


def test_txt_is_a_document_a_line(tmp_path):
    path = write(tmp_path / "a.txt", "\ufeffone\r\n\n 二\u2028 \n")
    assert [(row.fields, row.place) for row in read(path)] == [
        ({"text": "one"}, f"{path} line 1"),
        ({"text": " 二\u2028 "}, f"{path} line 3"),
    ]


# ---- parquet and arrow ----------------------------------------------------------------------------------------------

TABLE = [{"text": f"{i}", "history": [["q", "a"]] if i % 2 else None, "who": {"a": i}} for i in range(2500)]


def save(path, kind):
    table, sink = pyarrow.Table.from_pylist(TABLE), io.BytesIO()
    if kind == "parquet":
        pyarrow.parquet.write_table(table, sink, row_group_size=700)
    else:
        with (pyarrow.ipc.new_file if kind == "file" else pyarrow.ipc.new_stream)(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=1100)
    return write(path, sink.getvalue())


@pytest.mark.parametrize("gz", ["", ".gz"])
@pytest.mark.parametrize("kind", ["parquet", "file", "stream"])
def test_tables_are_what_pyarrow_reads_and_nulls_are_absent(tmp_path, kind, gz):
    path = save(tmp_path / f"a.{'parquet' if kind == 'parquet' else 'arrow'}{gz}", kind)
    found = list(read(path))
    assert [row.fields for row in found] == without_nulls(TABLE)
    assert [row.place for row in found] == [f"{path} row {i + 1}" for i in range(len(TABLE))]


@pytest.mark.parametrize("kind", ["parquet", "file", "stream"])
@pytest.mark.parametrize("keep", [0.0, 0.2, 0.9])
def test_a_table_that_is_cut_off_is_refused_by_name(tmp_path, kind, keep):
    path = tmp_path / f"a.{'parquet' if kind == 'parquet' else 'arrow'}"
    save(path, kind)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(DataError, match=f"a.{path.suffix[1:]} is (no {path.suffix[1:]} file|empty)"):
        list(scan(str(path)))
