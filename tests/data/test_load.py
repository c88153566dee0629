import json
from collections import Counter
from itertools import islice

import numpy as np
import pytest

from jaxsft import data, hub
from jaxsft.data import Config, DataError, batches, render, render_text
from jaxsft.data.chat import Text

from .conftest import conversation, documents, load, questions, write


@pytest.mark.parametrize("packing", [True, False])
def test_every_document_arrives_as_rendered(tmp_path, chatml, packing):
    data = questions(40)
    packed, _, report = load(write(tmp_path / "a.jsonl", data), chatml, max_length=192, packing=packing)
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
    packed, _, report = load(path, chatml, max_length=64, packing=True)
    assert report.truncated == 1
    assert max(len(ids) for ids, _ in documents(packed)) == 64
    whole = render(conversation({"instruction": "a", "output": "xyz" * 70}), chatml)
    assert (tuple(whole.ids[:64].tolist()), tuple(whole.mask[:64].tolist())) in documents(packed)


@pytest.mark.parametrize("max_length", [2, 16, 64, 1024])
@pytest.mark.parametrize("packing", [True, False])
def test_every_token_of_a_text_is_learned_once_an_epoch(tmp_path, chatml, max_length, packing):
    texts = ["hello world " * i + "你好🙂" for i in range(12)]
    packed, _, report = load(
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
    packed, _, report = load(path, real, max_length=512, packing=True)
    expected = Counter()
    for line in (shared / "sft_llamafactory" / "c4_demo.jsonl").read_text(encoding="utf-8").split("\n"):
        if line:
            expected.update(render_text(Text(json.loads(line)["text"]), real).ids[1:].tolist())
    assert Counter(number for row in packed for number in row.tokens[row.mask].tolist()) == expected
    assert report.efficiency > 0.97


def test_formats_may_be_mixed(tmp_path, chatml):
    data = [{"text": "hello"}, {"instruction": "a", "output": "b"}]
    assert load(write(tmp_path / "a.jsonl", data), chatml, max_length=64).report.documents == 2


def test_the_order_of_documents_changes_rows_but_not_what_is_learned(tmp_path, chatml):
    data = questions(30)
    first, _, _ = load(write(tmp_path / "a.jsonl", data), chatml, max_length=128, packing=True)
    other, _, _ = load(write(tmp_path / "b.jsonl", data[::-1]), chatml, max_length=128, packing=True)
    assert Counter(documents(first)) == Counter(documents(other))


def test_a_report_reads_well(tmp_path, chatml):
    report = load(write(tmp_path / "a.jsonl", questions(3)), chatml, max_length=512).report
    shown = dict(report.lines())
    assert (shown["rows"], shown["read as"]) == ("3", "alpaca")
    assert shown["efficiency"].endswith("% of 1 rows")
    assert shown["longest row"].endswith("a.jsonl line 3")


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


# ---- mixing and holding out -----------------------------------------------------------------------------------------


def test_sources_come_as_often_as_their_epochs(tmp_path, chatml):
    a, b = (
        write(tmp_path / "a.jsonl", questions(20)),
        write(tmp_path / "b.jsonl", [{"text": f"hello {i}"} for i in range(10)]),
    )
    mixed = load([data.Source(a, epochs=2), data.Source(b, epochs=0.5, format="text")], chatml, max_length=256)
    assert (mixed.report.rows, mixed.report.formats) == (45, {"alpaca": 20, "text": 10})
    times = Counter(documents(mixed.train)).values()
    assert Counter(times) == {2: 20, 1: 5}
    again = load([data.Source(a, epochs=2), data.Source(b, epochs=0.5, format="text")], chatml, max_length=256)
    assert documents(again.train) == documents(mixed.train)
    other = load([data.Source(a, epochs=2), data.Source(b, epochs=0.5, format="text")], chatml, max_length=256, seed=1)
    assert Counter(documents(other.train)) != Counter(documents(mixed.train))


def test_weights_decide_the_shares(tmp_path, chatml):
    a = write(tmp_path / "a.jsonl", questions(40))
    b = write(tmp_path / "b.jsonl", [{"text": f"hello {i}"} for i in range(10)])
    sources = [data.Source(a, weight=3), data.Source(b, weight=1)]
    texts = lambda loaded: sum(mask[1] for _, mask in documents(loaded.train))
    under = load(sources, chatml, max_length=256, mix="interleave_under")
    assert (under.report.rows, texts(under)) == (40, 10)
    over = load(sources, chatml, max_length=256, mix="interleave_over")
    assert (over.report.rows, texts(over)) == (53, 13)
    assert set(documents(over.train)) == set(documents(load([a, b], chatml, max_length=256).train))


def test_max_rows_reads_no_further(tmp_path, chatml):
    path = write(tmp_path / "a.jsonl", [*questions(5), {"broken": 1}])
    assert load([data.Source(path, max_rows=5)], chatml).report.rows == 5


def test_equal_rows_are_never_on_both_sides(tmp_path, chatml):
    unique = questions(60)
    as_messages = [
        {"messages": [{"role": "user", "content": r["instruction"]}, {"role": "assistant", "content": r["output"]}]}
        for r in unique[:30]
    ]
    a, b = write(tmp_path / "a.jsonl", unique + unique[::2]), write(tmp_path / "b.jsonl", as_messages)
    train, held, report = load([a, b], chatml, max_length=256, val_fraction=0.25)
    learned, measured = set(documents(train)), set(documents(held))
    assert not learned & measured
    assert len(measured) == 15
    assert len(learned) == 45
    assert report.duplicates == 60
    assert set(documents(load([a, b], chatml, max_length=256, val_fraction=0.25, seed=1)[1])) != measured


def test_pieces_of_a_text_stay_together(tmp_path, chatml):
    texts = [{"text": f"{letter} " * 40} for letter in "abcdefghijkl"]
    train, held, _ = load(write(tmp_path / "a.jsonl", texts), chatml, max_length=32, val_fraction=0.5)
    letters = lambda rows: {chatml.decode(ids[1:]).split()[0] for ids, _ in documents(rows)}
    assert len(documents(train)) > len(letters(train)) == 6
    assert not letters(train) & letters(held)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"val_fraction": 1.0}, "data.val_fraction is 1.0; it must lie between 0 and 1"),
        ({"val_fraction": 0.001}, "leaves none to measure on"),
        ({"val_fraction": 0.1, "eval": "x.jsonl"}, "data.eval and data.val_fraction are both given"),
        ({"mix": "interleave_over", "epochs": 2}, "a source has epochs, which data.mix interleave_over does not use"),
        ({"weight": 2}, "a source has weight, which data.mix concat does not use"),
        ({"epochs": 0}, "epochs of a source is 0; it must be above 0"),
    ],
)
def test_mixtures_that_contradict_themselves_are_refused(tmp_path, chatml, options, message):
    own = {name: options.pop(name) for name in ("epochs", "weight") if name in options}
    with pytest.raises(DataError, match=message):
        load([data.Source(write(tmp_path / "a.jsonl", questions(9)), **own)], chatml, **options)


# ---- LLaMA-Factory's files ------------------------------------------------------------------------------------------


def test_names_of_a_dataset_info_load_side_by_side(shared, real):
    info = str(shared / "sft_llamafactory" / "dataset_info.json")
    report = load(["alpaca_en_demo", "identity"], real, info=info).report
    raw = [json.loads((shared / "sft_llamafactory" / f"{n}.json").read_text()) for n in ("alpaca_en_demo", "identity")]
    assert report.rows == sum(map(len, raw))
    assert report.efficiency > 0.97


@pytest.mark.parametrize(
    "name", ["alpaca_zh_demo", "glaive_toolcall_en_demo", "glaive_toolcall_zh_demo", "wiki_demo", "c4_demo"]
)
def test_every_published_set_loads_whole(shared, name):
    tokenizer = data.with_template(hub.load_tokenizer(str(shared / "tokenizers" / "minimind_6400")))
    loaded = load(name, tokenizer, info=str(shared / "sft_llamafactory"))
    assert loaded.report.dropped == 0
    assert loaded.report.trained_tokens > 0


@pytest.mark.parametrize(("name", "kind"), [("dpo_en_demo", "preference"), ("kto_en_demo", "unpaired")])
def test_published_judgements_load_whole(shared, name, kind):
    tokenizer = hub.load_tokenizer(str(shared / "tokenizers" / "minimind_6400"))
    config = Config(train=name, info=str(shared / "sft_llamafactory"))
    loaded = data.load_pairs(config, tokenizer, kind)
    assert len(loaded.train.documents) == 240
    assert loaded.report.efficiency > 0.8


@pytest.mark.parametrize("processes", [1, 2])
def test_a_mixture_goes_on_after_any_batch_when_everything_is_loaded_anew(tmp_path, chatml, processes):
    a = write(tmp_path / "a.jsonl", questions(23))
    b = write(tmp_path / "b.jsonl", [{"text": f"hello {i} " * 30} for i in range(9)])
    sources = [data.Source(a, weight=2), data.Source(b, weight=1)]
    options = {"mix": "interleave_over", "val_fraction": 0.2, "max_length": 48, "cache": str(tmp_path / "cache")}
    share = {"seed": 5, "epochs": None, "processes": processes}

    def take(process, position, count):
        rows = load(sources, chatml, **options).train
        return list(islice(batches(rows, 4, position=position, process=process, **share), count))

    for process in range(processes):
        whole = take(process, None, 12)
        for at in (0, 3, 10):
            position = json.loads(json.dumps(whole[at].position))
            rest = take(process, position, 11 - at)
            assert [one.position for one in rest] == [one.position for one in whole[at + 1 :]]
            for one, other in zip(rest, whole[at + 1 :], strict=True):
                assert all(np.array_equal(x, y) for x, y in zip(one.tokens, other.tokens, strict=True))
    with open(b, "a") as file:
        file.write("\n" + json.dumps({"text": "one more"}))
    with pytest.raises(DataError, match="the data is not that of the checkpoint"):
        take(0, position, 1)
