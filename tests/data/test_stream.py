import json
from collections import Counter
from itertools import islice

import numpy as np
import pytest

from jaxsft.data import DataError, Example, Message, batches, load, render, render_text, steps_per_epoch
from jaxsft.data.chat import Conversation, Text
from jaxsft.data.pack import plan
from jaxsft.data.stream import gather

SEEDS = 7


def write(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return str(path)


def questions(count):
    """Alpaca rows of many lengths, each with its own number in it."""
    return [{"instruction": f"hello {i} " * (i % 5 + 1), "output": f"world {i} " * (i % 7 + 1)} for i in range(count)]


def conversation(row):
    return Conversation((Message("user", row["instruction"]), Message("assistant", row["output"])))


def documents(rows):
    """(ids, mask) of every document in rows of Tokens, by a plain loop."""
    found = []
    for row in rows:
        for number in range(1, int(row.segments.max(initial=0)) + 1):
            here = row.segments == number
            found.append((tuple(row.tokens[here].tolist()), tuple(row.mask[here].tolist())))
    return found


def split(batch):
    """The rows of a batch."""
    return [type(batch.tokens)(*arrays) for arrays in zip(*batch.tokens, strict=True)]


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a.tokens, b.tokens, strict=True)) and a[1:] == b[1:]


@pytest.fixture(scope="module")
def rows():
    """23 short documents in rows of two or so."""
    made = [Example(np.full(i % 5 + 2, i + 1, np.int32), np.arange(i % 5 + 2) > 0) for i in range(23)]
    return gather(made, plan([len(d.ids) for d in made], 8), 8)


@pytest.mark.parametrize("packing", [True, False])
def test_every_document_arrives_as_rendered(tmp_path, chatml, packing):
    data = questions(40)
    packed, report = load(write(tmp_path / "a.jsonl", data), chatml, max_length=192, packing=packing)
    rendered = [render(conversation(row), chatml) for row in data]
    expected = Counter((tuple(ids.tolist()), tuple(mask.tolist())) for ids, mask in rendered)
    assert Counter(documents(packed)) == expected
    assert report.rows == report.documents == 40
    assert report.truncated == 0
    assert report.tokens == sum(len(ids) for ids, _ in rendered)
    assert report.trained_tokens == sum(int(mask.sum()) for _, mask in rendered)
    assert report.trained_tokens == sum(int(row.mask.sum()) for row in packed)
    assert report.packed_rows == len(packed)
    assert report.efficiency == pytest.approx(np.mean([row.segments > 0 for row in packed]))


def test_without_packing_rows_are_as_long_as_the_longest_rounded_up(tmp_path, chatml):
    path = write(tmp_path / "a.jsonl", [{"instruction": "a", "output": "x" * 70}, {"instruction": "a", "output": "b"}])
    assert load(path, chatml, max_length=1024, packing=False)[0][0].tokens.shape == (128,)
    assert load(path, chatml, max_length=100, packing=False)[0][0].tokens.shape == (100,)
    assert load(path, chatml, max_length=1024, packing=True)[0][0].tokens.shape == (1024,)


def test_long_conversations_are_truncated_and_counted(tmp_path, chatml):
    path = write(
        tmp_path / "a.jsonl", [{"instruction": "a", "output": "xyz" * 70}, {"instruction": "a", "output": "b"}]
    )
    packed, report = load(path, chatml, max_length=64, packing=True)
    assert report.truncated == 1
    assert max(len(ids) for ids, _ in documents(packed)) == 64
    whole = render(conversation({"instruction": "a", "output": "xyz" * 70}), chatml)
    assert (tuple(whole.ids[:64].tolist()), tuple(whole.mask[:64].tolist())) in documents(packed)


@pytest.mark.parametrize("max_length", [2, 16, 64, 1024])
@pytest.mark.parametrize("packing", [True, False])
def test_every_token_of_a_text_is_learned_once_an_epoch(tmp_path, chatml, max_length, packing):
    texts = ["hello world " * i + "你好🙂" for i in range(12)]
    packed, report = load(
        write(tmp_path / "a.jsonl", [{"text": text} for text in texts]), chatml, max_length=max_length, packing=packing
    )
    expected = Counter()
    for text in texts:
        expected.update(chatml(text, add_special_tokens=False)["input_ids"])
        expected[chatml.eos_token_id] += 1
    learned = Counter()
    for batch in batches(packed, 4, seed=1, epochs=2):
        learned.update(batch.tokens.tokens[batch.tokens.mask].tolist())
    assert learned == Counter({number: 2 * times for number, times in expected.items()})
    assert report.trained_tokens == expected.total()
    assert report.rows == 12
    assert report.truncated == 0


def test_published_texts_lose_no_token(shared, real):
    path = str(shared / "sft_llamafactory" / "c4_demo.jsonl")
    packed, report = load(path, real, max_length=512, packing=True)
    expected = Counter()
    for line in (shared / "sft_llamafactory" / "c4_demo.jsonl").read_text(encoding="utf-8").split("\n"):
        if line:
            expected.update(render_text(Text(json.loads(line)["text"]), real).ids[1:].tolist())
    assert Counter(number for row in packed for number in row.tokens[row.mask].tolist()) == expected
    assert report.efficiency > 0.97


def test_formats_may_be_mixed(tmp_path, chatml):
    data = [{"text": "hello"}, {"instruction": "a", "output": "b"}]
    assert load(write(tmp_path / "a.jsonl", data), chatml, max_length=64, packing=True)[1].documents == 2


def test_the_order_of_documents_changes_rows_but_not_what_is_learned(tmp_path, chatml):
    data = questions(30)
    first, _ = load(write(tmp_path / "a.jsonl", data), chatml, max_length=128, packing=True)
    other, _ = load(write(tmp_path / "b.jsonl", data[::-1]), chatml, max_length=128, packing=True)
    assert Counter(documents(first)) == Counter(documents(other))


def test_a_report_reads_well(tmp_path, chatml):
    report = load(write(tmp_path / "a.jsonl", questions(3)), chatml, max_length=512, packing=True)[1]
    assert dict(report.lines())["rows"] == "3"
    assert dict(report.lines())["efficiency"].endswith("%")


NO_STOP = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ([{"a": "b"}], {}, "a.jsonl line 1: columns a fit no format"),
        ([{"text": "a"}, {"text": 3}], {}, "a.jsonl line 2: text is 3; expected a string"),
        ([{"text": "a"}], {"format": "alpaca"}, "a.jsonl line 1: alpaca rows need instruction and output"),
        ([{"text": "a"}], {"format": "x"}, "data.format is 'x'; there are auto, alpaca"),
        ([{"text": "a"}], {"max_length": 1}, "data.max_length is 1; it must be at least 2"),
        (
            questions(1),
            {"max_length": 2},
            "a.jsonl line 1: truncation of 1?.* tokens leaves none .*; raise data.max_length",
        ),
    ],
)
def test_errors_name_the_row_and_the_remedy(tmp_path, chatml, data, options, message):
    with pytest.raises(DataError, match=message):
        load(write(tmp_path / "a.jsonl", data), chatml, **{"max_length": 64, "packing": True} | options)


def test_a_row_that_teaches_nothing_is_refused(tmp_path, make):
    path = write(tmp_path / "a.jsonl", [{"instruction": "a", "output": "b"}, {"instruction": "a", "output": ""}])
    with pytest.raises(DataError, match=r"line 2: no token is learned: the answer is empty .*; remove the row"):
        load(path, make(eos_token="<|im_end|>", chat_template=NO_STOP), max_length=64, packing=True)


def test_no_source_is_refused(chatml):
    for source in ("", []):
        with pytest.raises(DataError, match=r"data.train is empty; give a file such as train\.jsonl"):
            load(source, chatml, max_length=64, packing=True)


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
    assert sum(batch.count for batch in found) == epochs * len(rows.ids)
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
