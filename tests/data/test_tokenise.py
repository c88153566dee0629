"""A whole source to documents on disk: bad rows, the cache, several processes."""

import dataclasses
import os

import pytest

from jaxsft import data
from jaxsft.data import Config, DataError

from .conftest import documents, load, questions, write

# ---- bad rows -------------------------------------------------------------------------------------------------------

BAD = [
    {"instruction": "a"},
    {"instruction": "hello", "output": "world"},
    {"text": 3},
    {"instruction": "", "output": "b"},
]


def test_bad_rows_are_all_told_before_the_run_ends(tmp_path, chatml):
    with pytest.raises(DataError) as told:
        load(write(tmp_path / "a.jsonl", BAD), chatml, max_length=64)
    first, *lines, last = str(told.value).split("\n")
    assert first == "3 rows cannot be used:"
    assert [line.split(": ")[0].strip() for line in lines] == [f"{tmp_path}/a.jsonl line {n}" for n in (1, 3, 4)]
    assert last == "Mend them, or data.on_bad_row skip leaves them out"


def test_no_more_than_twenty_are_listed(tmp_path, chatml):
    with pytest.raises(DataError) as told:
        load(write(tmp_path / "a.jsonl", [{"instruction": "a"}] * 300), chatml, max_length=64)
    assert str(told.value).startswith("20 or more rows cannot be used:")
    assert str(told.value).count("a.jsonl line") == 20


def test_skipped_rows_are_counted_and_named(tmp_path, chatml):
    rows, _, report = load(write(tmp_path / "a.jsonl", BAD), chatml, max_length=64, on_bad_row="skip")
    assert (report.rows, report.dropped, len(documents(rows))) == (1, 3, 1)
    assert [line.partition(": ")[0] for line in report.bad] == [f"{tmp_path}/a.jsonl line {n}" for n in (1, 3, 4)]


def test_rows_lost_from_the_held_out_file_are_told_as_well(tmp_path, chatml):
    train, held = write(tmp_path / "a.jsonl", questions(4)), write(tmp_path / "b.jsonl", BAD)
    report = load(train, chatml, eval=held, on_bad_row="skip").report
    assert (report.rows, report.held_out, report.dropped) == (4, 1, 3)
    assert dict(report.lines())["held out"] == "1 rows"
    assert "b.jsonl line 1" in dict(report.lines())["dropped"]


def test_rows_of_nothing_but_bad_ones_are_refused(tmp_path, chatml):
    with pytest.raises(DataError, match=r"a.jsonl has no row that can be used, and 1 that cannot; the first: .*line 1"):
        load(write(tmp_path / "a.jsonl", BAD[:1]), chatml, on_bad_row="skip")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": "a", "chosen": "b", "rejected": "c"},
            "the row holds a preference .preference.; this run takes conv",
        ),
        ({"image_path": "a.png", "label": "b"}, "the row holds an image .image."),
        (
            {
                "messages": [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "x"}],
                "images": ["a"],
            },
            "the row has 1 images, which no language model here can see",
        ),
    ],
)
def test_rows_for_another_kind_of_run_are_refused(tmp_path, chatml, row, message):
    with pytest.raises(DataError, match=message):
        load(write(tmp_path / "a.jsonl", [row]), chatml)


# ---- the cache ------------------------------------------------------------------------------------------------------


def test_what_was_tokenised_is_not_tokenised_again(tmp_path, chatml, monkeypatch):
    path = write(tmp_path / "a.jsonl", questions(40))
    first = load(path, chatml, max_length=128)
    monkeypatch.setattr("jaxsft.data.tokenise.encode", None)
    second = load(path, chatml, max_length=128)
    assert (first.report.cached, second.report.cached) == (False, True)
    assert first.report._replace(cached=True) == second.report
    assert first.train.digest == second.train.digest
    assert documents(first.train) == documents(second.train)
    moved = write(tmp_path / "elsewhere.jsonl", questions(40))
    assert load(moved, chatml, max_length=128).report.cached


@pytest.mark.parametrize(
    "change",
    [
        {"max_length": 96},
        {"learn": "last"},
        {"reasoning": "mask"},
        {"system": "be kind"},
        {"control_tokens": True},
        {"on_bad_row": "skip"},
        {"train": [data.Source("", max_rows=39)]},
    ],
)
def test_another_setting_is_tokenised_anew(tmp_path, chatml, change):
    path = write(tmp_path / "a.jsonl", questions(40))
    plain = Config(train=path, max_length=128, cache=str(tmp_path / "cache"))
    before = data.load(plain, chatml).train.digest
    if "train" in change:
        change = {"train": [dataclasses.replace(change["train"][0], path=path)]}
    changed = data.load(dataclasses.replace(plain, **change), chatml)
    assert not changed.report.cached
    assert changed.train.digest != before


def test_a_changed_row_template_or_tokenizer_is_noticed(tmp_path, make):
    rows = questions(40)
    path, cache = write(tmp_path / "a.jsonl", rows), str(tmp_path / "cache")
    tokenizer = lambda **more: data.with_template(make(eos_token="<|im_end|>", **more))
    seen = {load(path, tokenizer(), cache=cache).train.digest}
    stat = (tmp_path / "a.jsonl").stat()
    rows[7]["output"] = rows[7]["output"][::-1]  # as long as before, and with the same time
    write(tmp_path / "a.jsonl", rows)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    seen.add(load(path, tokenizer(), cache=cache).train.digest)
    seen.add(load(path, tokenizer(chat_template=data.templates.source("plain")), cache=cache).train.digest)
    seen.add(load(path, tokenizer(bos_token="<s>"), cache=cache).train.digest)
    assert len(seen) == 4


def test_a_run_that_fails_leaves_nothing_in_the_cache(tmp_path, chatml):
    with pytest.raises(DataError):
        load(write(tmp_path / "a.jsonl", BAD), chatml, cache=str(tmp_path / "cache"))
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_cache_that_cannot_be_written_says_so(tmp_path, chatml):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(DataError, match=r"data.cache .* cannot be written"):
        load(write(tmp_path / "a.jsonl", questions(2)), chatml, cache=str(tmp_path / "cache"))


def test_half_a_cache_is_told(tmp_path, chatml):
    path, cache = write(tmp_path / "a.jsonl", questions(2)), tmp_path / "cache"
    load(path, chatml, cache=str(cache))
    (next(cache.iterdir()) / "ids.bin").unlink()
    with pytest.raises(DataError, match=r"is not whole .*; delete it"):
        load(path, chatml, cache=str(cache))


def test_several_processes_give_the_same_documents_in_the_same_order(tmp_path, chatml):
    path = write(tmp_path / "a.jsonl", questions(1100))
    one = load(path, chatml, max_length=256, workers=1, cache=str(tmp_path / "one"))
    two = load(path, chatml, max_length=256, workers=2, cache=str(tmp_path / "two"))
    assert not two.report.cached
    assert one.report == two.report
    assert documents(one.train) == documents(two.train)


def test_bad_rows_from_several_processes_are_told(tmp_path, chatml):
    path = write(tmp_path / "a.jsonl", [*questions(600), {"text": 3}])
    with pytest.raises(DataError, match=r"a.jsonl line 601: text is 3"):
        load(path, chatml, workers=2, cache=str(tmp_path / "cache"))
