"""What holds for every kind of file: names, limits, encodings, files that are not what their ending says."""

import json
import tracemalloc

import pytest

from jaxsft.rag import readers
from jaxsft.rag.readers import ReadError

from .conftest import sample

TEXTS = [".txt", ".md", ".html", ".csv", ".json", ".jsonl"]


def test_every_kind_of_file_is_read(tmp_path):
    files = sample(tmp_path)
    assert set(files) == set(readers.SUFFIXES)
    for suffix, file in files.items():
        [document] = readers.read(tmp_path, file)
        assert "The lamp is red." in document.text
        assert document.source.partition("#")[0] == f"a{suffix}"
        assert document.title
        covered = "".join(document.text[section.start : section.end] for section in document.sections)
        assert covered.split() == document.text.split()


@pytest.mark.parametrize("suffix", readers.SUFFIXES)
def test_an_empty_file_has_no_documents(read, suffix):
    assert read(f"a{suffix}", b"") == []


@pytest.mark.parametrize("suffix", [".txt", ".md", ".html", ".json", ".jsonl", ".csv"])
def test_blanks_alone_are_no_document(read, suffix):
    assert read(f"a{suffix}", b"\n \n\n") == []


def test_a_source_is_the_way_from_the_folder(read):
    [document] = read("lamps/oil/notes.txt", "Whale.")
    assert document.source == "lamps/oil/notes.txt"
    assert document.title == "notes"


def test_a_kind_that_nobody_reads_lists_those_that_are_read(read):
    with pytest.raises(ReadError, match=r"a\.xls: is of no known kind '\.xls'; there are \.txt, \.md"):
        read("a.xls", b"x")


def test_a_file_that_is_not_there_says_so(tmp_path):
    with pytest.raises(ReadError, match=r"gone\.txt: cannot be read \(No such file"):
        list(readers.read(tmp_path, tmp_path / "gone.txt"))


@pytest.mark.parametrize("suffix", [s for s in readers.SUFFIXES if s not in readers.STREAMED])
def test_a_file_over_the_limit_is_refused_before_it_is_read(tmp_path, suffix):
    file = sample(tmp_path)[suffix]
    size = file.stat().st_size
    with pytest.raises(
        ReadError, match=rf"has {size:,} bytes, and the limit is {size - 1:,}; raise max_bytes"
    ) as error:
        list(readers.read(tmp_path, file, max_bytes=size - 1))
    assert (error.value.file, error.value.remedy) == (str(file), "raise max_bytes, or cut the file into several")


@pytest.mark.parametrize("suffix", readers.STREAMED)
def test_a_table_may_be_larger_than_the_limit(tmp_path, suffix):
    file = sample(tmp_path)[suffix]
    assert list(readers.read(tmp_path, file, max_bytes=file.stat().st_size - 1))


@pytest.mark.parametrize("suffix", readers.STREAMED)
def test_a_table_is_never_in_memory_as_a_whole(tmp_path, suffix):
    file = tmp_path / f"a{suffix}"
    line = {".csv": "x" * 4000, ".jsonl": json.dumps({"text": "x" * 4000})}[suffix]
    file.write_text("text\n" * (suffix == ".csv") + f"{line}\n" * 3000, encoding="utf-8")
    next(readers.read(tmp_path, file))  # what is imported counts no more
    tracemalloc.start()
    try:
        count = sum(1 for _ in readers.read(tmp_path, file))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 3000
    assert peak < file.stat().st_size / 3  # twelve megabytes; two pieces of one are looked at for the encoding


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("suffix", [".txt", ".md", ".html", ".csv"])
def test_texts_are_read_in_utf_8_and_in_what_their_mark_says(read, suffix, encoding):
    text = {".html": "<p>灯塔是红色的 🙂</p>", ".csv": "word\n灯塔是红色的 🙂\n"}.get(suffix, "灯塔是红色的 🙂")
    [document] = read(f"a{suffix}", text.encode(encoding))
    assert document.text.strip() == "灯塔是红色的 🙂"


@pytest.mark.parametrize(
    ("encoding", "text"),
    [("cp1252", "Der Wärter öffnet die Tür um fünf; später schließt er sie. Das Öl ist für die Lampe."),
     ("gb18030", "灯塔的守护人每天早上打开大门，晚上再把大门关上。图书馆星期一不开放，星期二开放。")],
)  # fmt: skip
def test_another_encoding_is_guessed(read, encoding, text):
    [document] = read("a.txt", text.encode(encoding) * 5)
    assert document.text == text * 5


@pytest.mark.parametrize("suffix", TEXTS)
@pytest.mark.parametrize("kind", [".png", ".gz", ".pdf", ".docx"])
def test_what_is_no_text_is_refused_whatever_its_ending(read, tmp_path, suffix, kind):
    import gzip
    import io

    from PIL import Image

    picture = io.BytesIO()
    Image.effect_noise((40, 40), 80).save(picture, "png")
    data = {".png": picture.getvalue(), ".gz": gzip.compress(bytes(range(256)) * 30)}
    data |= {s: file.read_bytes() for s, file in sample(tmp_path).items() if s == ".docx"}
    data[".pdf"] = b"%PDF-1.7\n" + gzip.compress(bytes(range(256)) * 30)
    with pytest.raises(ReadError, match=r"b\.\w+: "):
        read(f"b{suffix}", data[kind])


@pytest.mark.parametrize("suffix", [".pdf", ".docx"])
@pytest.mark.parametrize("data", [b"The lamp is red.", b"\0\1\2" * 500, b"PK\3\4 and no more", b"%PDF-1.4\n"])
def test_what_is_no_such_document_is_refused(read, suffix, data):
    with pytest.raises(ReadError, match=r"a\.\w+: is (a broken|no) .*; (open|save) "):
        read(f"a{suffix}", data)


@pytest.mark.parametrize("suffix", [".pdf", ".docx"])
def test_a_document_that_was_cut_short_is_refused_or_read(tmp_path, suffix):
    file = sample(tmp_path)[suffix]
    whole = file.read_bytes()
    refused = 0
    for size in range(1, len(whole), len(whole) // 12):
        file.write_bytes(whole[:size])
        try:  # pypdf finds the objects of a file without its table
            found = list(readers.read(tmp_path, file))
            assert [document.text for document in found] == ["The lamp is red."]
        except ReadError:
            refused += 1
    assert refused > 5
