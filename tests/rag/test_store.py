import dataclasses
import os
from pathlib import Path

import pytest

from jaxsft.rag import index, store
from jaxsft.rag.search import Searcher
from jaxsft.run import RunError

from .hashing import Hashing, about, build, contents, write

TEXTS = {"a.txt": "The lamp is red.", "b.txt": "The boat is in the harbour."}


def test_an_opened_store_says_what_it_was_made_with(tmp_path):
    made = store.create(str(tmp_path / "s"), about(size=7, overlap=2))
    assert store.open(made.uri, Hashing()).about == about(size=7, overlap=2)
    store.describe(made, about(size=9, overlap=1))
    assert store.open(made.uri).about == about(size=9, overlap=1)


def test_a_place_without_a_store_tells_how_to_make_one(tmp_path):
    for place in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(RunError, match=f"no store at {place}; make one with: scripts/rag.py index --docs FOLDER"):
            store.open(str(place))
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_a_store_is_left_alone(tmp_path):
    (tmp_path / "letter.txt").write_text("Dear")
    with pytest.raises(RunError, match=r"holds other things than a store \(letter.txt\)"):
        store.create(str(tmp_path), about())
    with (
        pytest.raises(RunError, match=r"holds other things than a store \(letter.txt\)"),
        store.writing(str(tmp_path)),
    ):
        pass
    with pytest.raises(RunError, match="is a file, and a store is a folder"):
        store.open(str(tmp_path / "letter.txt"))
    assert [entry.name for entry in tmp_path.iterdir()] == ["letter.txt"]


def test_a_store_is_not_made_twice(tmp_path):
    with pytest.raises(RunError, match="is a store already"):
        store.create(build(tmp_path, TEXTS).uri, about())


def test_what_a_killed_process_left_of_a_store_is_replaced_and_tables_of_others_are_not(tmp_path):
    uri = store.create(str(tmp_path / "s"), about()).uri
    store.connect(uri).drop_table(store.ABOUT)
    for file in Path(uri, "files.lance", "_versions").iterdir():
        file.unlink()
    assert not store.exists(uri)
    assert store.create(uri, about()).about == about()
    other = str(tmp_path / "other")
    store.connect(other).create_table("passages", [{"verse": "A rose"}])
    with pytest.raises(RunError, match="holds a table passages that is not of a store"):
        store.create(other, about())
    assert store.connect(other).open_table("passages").count_rows() == 1


def test_another_embedder_is_refused_by_name_and_remedy(tmp_path):
    made = build(tmp_path, TEXTS)
    other = Hashing(name="other", digest="other-1")
    wanted = r"made with the embedder hashing \(hashing-1\), not with other \(other-1\).* use --embedder hashing, or"
    with pytest.raises(RunError, match=wanted):
        store.open(made.uri, other)
    with pytest.raises(RunError, match=wanted):
        Searcher(made, other).find("lamp")
    assert Searcher(made, other).find("lamp", mode="text")  # words need no embedder


def test_a_store_of_another_format_is_refused(tmp_path):
    made = store.create(str(tmp_path / "s"), dataclasses.replace(about(), format=store.FORMAT + 1))
    with pytest.raises(RunError, match=r"is a store of format 2, and this reads 1; index into a new one"):
        store.open(made.uri)


@pytest.mark.parametrize("part", ["passages.lance/_versions", "passages.lance/data", "about.lance/data"])
@pytest.mark.parametrize("damage", ["half", "empty", "junk"])
def test_a_damaged_store_is_one_clear_error(tmp_path, part, damage):
    made = build(tmp_path, TEXTS)
    for file in Path(made.uri, part).iterdir():
        content = file.read_bytes()
        file.write_bytes({"half": content[: len(content) // 2], "empty": b"", "junk": bytes(len(content))}[damage])
    with pytest.raises(RunError, match=r"the store .* cannot be read: .*; if it is damaged, delete it and index again"):
        Searcher(store.open(made.uri), Hashing()).find("lamp")


def test_one_process_writes_and_others_read_meanwhile(tmp_path):
    made = build(tmp_path, TEXTS)
    with store.writing(made.uri):
        with (
            pytest.raises(RunError, match=f"process {os.getpid()} is writing to {made.uri}; wait until it is done"),
            store.writing(made.uri),
        ):
            pass
        assert len(Searcher(store.open(made.uri), Hashing()).find("lamp", k=9)) == 2
    with store.writing(made.uri):
        pass


def test_a_reader_sees_what_was_written_after_it_began(tmp_path):
    made = build(tmp_path, TEXTS)
    reader = Searcher(store.open(made.uri), Hashing())
    index.update(made, write(tmp_path / "docs", {"c.txt": "A cat called Button."}), Hashing())
    assert reader.find("Button", k=1)[0].passage.source == "c.txt"


def test_replacing_a_document_is_one_version_of_the_store(tmp_path):
    made = build(tmp_path, {"a.txt": "The lamp is red. " * 9, **TEXTS})
    lamp = write(tmp_path / "docs", {"a.txt": "The lamp is green now. " * 9})
    [before] = {row["digest"] for row in made.passages.search().where("source = 'a.txt'").to_list()}
    ready = [index.Ready("a.txt", "a.txt", "x", index.split(*_document(lamp), size=12), new=False)]
    version = made.passages.version
    index._write(made, ready, Hashing().documents([one.text for one in ready[0].passages]))
    assert made.passages.version == version + 1
    after = [row for row in contents(made) if row[0] == "a.txt"]
    assert {row[4] for row in after} == {"x"} != {before}
    assert len(after) == len(ready[0].passages)


def _document(folder):
    from jaxsft.rag import readers

    return next(iter(readers.read(folder, folder / "a.txt"))), Hashing().length


def test_a_store_need_not_be_a_folder(tmp_path):
    assert store.remote("s3://bucket/store")
    assert not store.remote(str(tmp_path))
    with store.writing("memory://x"):
        made = store.create("memory://x", about())
        index.update(made, write(tmp_path, TEXTS), Hashing())
    assert Searcher(made, Hashing()).find("lamp", k=1)[0].passage.text == "The lamp is red."


def test_all_passages_of_a_store_can_be_had(tmp_path):
    assert sorted(store.texts(build(tmp_path, TEXTS))) == sorted(TEXTS.values())
