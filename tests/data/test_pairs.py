import json
from collections import Counter
from itertools import islice

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxsft import data, hub
from jaxsft.data import Config, DataError, Example, batches, comparisons, load_pairs, pairs_in_memory, questions
from jaxsft.data.pairs import elsewhere
from jaxsft.types import reads

from .conftest import write
from .test_stream import same, split

END = "<|im_end|>"


def words(count):
    return " ".join(["hello"] * count)


def opened(tmp_path, tokenizer, rows, kind="preference", **options):
    options.setdefault("cache", str(tmp_path / "cache"))
    return load_pairs(Config(train=write(tmp_path / "rows.jsonl", rows), **options), tokenizer, kind)


def preferences(count):
    return [
        {
            "prompt": f"p{i} {words(i % 4)}",
            "chosen": f" c{i} {words(3 * i % 11)}",
            "rejected": f" r{i}",
            "margin": i / 2,
        }
        for i in range(count)
    ]


def judged(count):
    return [{"prompt": f"p{i}", "completion": f" a{i} {words(i % 5)}", "label": i % 3 == 0} for i in range(count)]


def unpacked(row):
    """What lies in a row of Pairs, by a plain loop: (number, value, chosen, rejected), documents as they stand alone.

    A document is the segment that its branch reads, and the branch: ((id, learned, position), ...).
    """
    cells = list(zip(*(array.tolist() for array in row[:4]), strict=True))
    of = lambda segment: tuple(cell[:3] for cell in cells if cell[3] == segment)
    found = []
    for k, exists in enumerate(row.exists.tolist()):
        prompt, chosen, rejected = (of(3 * k + part) for part in (1, 2, 3))
        if exists:
            found.append((int(row.row[k]), float(row.value[k]), prompt + chosen, prompt + rejected))
        else:
            assert prompt + chosen + rejected == ()
            assert (row.row[k], row.value[k], row.reference[k].tolist()) == (-1, 0, [0, 0])
    return found


def cells_of(document):
    """A document as `unpacked` gives it."""
    return tuple(zip(document.ids.tolist(), document.mask.tolist(), range(len(document.ids)), strict=True))


def expected(rows):
    """The pairs of a data set as `unpacked` gives them."""
    return {
        (number, float(rows.values[number]), *map(cells_of, rows.pair(number))) for number in range(len(rows.documents))
    }


# ---- the layout ------------------------------------------------------------------------------------------------------


def test_the_prompt_stands_once_and_both_answers_begin_with_its_last_token():
    document = lambda *ids: Example(np.array(ids), np.array(ids) >= 50)
    one, two = (document(1, 2, 3, 50, 51), document(1, 2, 3, 60)), (document(7, 70), document(7, 80, 81))
    row = pairs_in_memory([one, two], 16, [[0, 1]], values=[0.5, 0])[0]
    assert row.tokens.tolist() == [1, 2, 3, 50, 51, 3, 60, 7, 70, 7, 80, 81, 0, 0, 0, 0]
    assert row.mask.astype(int).tolist() == [0, 0, 0, 1, 1, 0, 1, 0, 1, 0, 1, 1, 0, 0, 0, 0]
    assert row.positions.tolist() == [0, 1, 2, 3, 4, 2, 3, 0, 1, 0, 1, 2, 0, 0, 0, 0]
    assert row.segments.tolist() == [1, 1, 2, 2, 2, 3, 3, 5, 5, 6, 6, 6, 0, 0, 0, 0]
    assert reads(row.segments).tolist() == [1, 1, 1, 1, 1, 1, 1, 4, 4, 4, 4, 4, 0, 0, 0, 0]
    assert (row.value.tolist(), row.exists.tolist(), row.row.tolist()) == ([0.5, 0], [True, True], [0, 1])
    kinds = [array.dtype.name for array in row]
    assert kinds == ["int32", "bool", "int32", "int32", "float32", "bool", "int32", "float32"]


def test_a_prompt_that_may_not_be_shared_stands_in_both_documents():
    document = lambda *ids: Example(np.array(ids), np.array(ids) >= 50)
    pair = document(1, 2, 50), document(1, 2, 60)
    row = pairs_in_memory([pair, pair], 13, [[0, 1]], share_prompt=False)[0]
    assert row.tokens.tolist() == [1, 2, 50, 1, 2, 60] * 2 + [0]
    assert row.positions.tolist() == [0, 1, 2] * 4 + [0]
    assert row.segments.tolist() == [2, 2, 2, 3, 3, 3, 5, 5, 5, 6, 6, 6, 0]


def test_what_both_answers_begin_with_is_no_prompt():
    document = lambda *ids: Example(np.array(ids), np.arange(len(ids)) > 1)
    row = pairs_in_memory([(document(1, 2, 9, 4), document(1, 2, 9, 5))], 7)[0]
    assert row.segments.tolist() == [1, 2, 2, 2, 3, 3, 3]
    assert row.tokens[row.mask].tolist() == [9, 4, 9, 5]


# ---- any pairs: nothing lost, nothing invented -----------------------------------------------------------------------

QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
SIZES = st.lists(st.tuples(st.integers(0, 5), st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=20)


def drawn(sizes):
    """Pairs of these lengths of prompt and answers; every token is another."""
    pairs, at = [], 1
    for prompt, *answers in sizes:
        asked, at = np.arange(at, at + prompt), at + prompt
        pair = []
        for answer in answers:
            ids, at = np.r_[asked, np.arange(at, at + answer + (not prompt))], at + answer + 1
            pair.append(Example(ids, np.arange(len(ids)) >= max(prompt, 1)))  # a first token is never learned
        pairs.append(tuple(pair))
    return pairs


@QUICK
@given(
    sizes=SIZES, room=st.integers(1, 4), share=st.booleans(), size=st.integers(1, 4), seed=st.none() | st.integers(0, 9)
)
def test_each_answer_is_learned_once_an_epoch_and_no_token_is_lost_or_invented(sizes, room, share, size, seed):
    pairs = drawn(sizes)
    plan = [list(range(i, min(i + room, len(pairs)))) for i in range(0, len(pairs), room)]
    values = [i / 4 for i in range(len(pairs))]
    rows = pairs_in_memory(pairs, 22 * room, plan, values=values, share_prompt=share)
    found = list(batches(rows, size, seed=seed, epochs=2))
    seen = Counter(pair for batch in found for row in split(batch) for pair in unpacked(row))
    whole = [(i, values[i], *map(cells_of, pair)) for i, pair in enumerate(pairs)]
    assert seen == Counter(dict.fromkeys(whole, 2))
    both = sum(len(side.ids) for pair in pairs for side in pair)
    assert sum(batch.count for batch in found) == 2 * (both - int(rows.shared.sum()))
    assert rows.shared.tolist() == [max(prompt - 1, 0) * share for prompt, *_ in sizes]
    learned = Counter(i for batch in found for i in batch.tokens.tokens[batch.tokens.mask].tolist())
    assert learned == Counter(i for pair in pairs for side in pair for i in side.ids[side.mask].tolist() for _ in "ab")
    assert {tuple(array.shape for array in batch.tokens) for batch in found} == {
        (*[(size, 22 * room)] * 4, *[(size, rows.most)] * 3, (size, rows.most, 2))
    }


@settings(QUICK, max_examples=12)
@given(sizes=SIZES, size=st.integers(1, 3), seed=st.integers(0, 9), at=st.integers(0, 5), processes=st.integers(1, 2))
def test_any_order_goes_on_from_any_place_and_is_shared_between_processes(sizes, size, seed, at, processes):
    rows = pairs_in_memory(drawn(sizes), 22).with_reference(np.arange(2 * len(sizes)).reshape(-1, 2), "a")

    def take(position, count, **share):
        endless = batches(rows, size * processes, seed=seed, epochs=None, position=position, **share)
        return list(islice(endless, count))

    whole = take(None, at + 3)
    assert all(map(same, take(whole[at].position, 2), whole[at + 1 :]))
    parts = [take(None, at + 3, process=process, processes=processes) for process in range(processes)]
    for batch, *shares in zip(whole, *parts, strict=True):
        joined = [np.concatenate(arrays) for arrays in zip(*(share.tokens for share in shares), strict=True)]
        assert all(map(np.array_equal, joined, batch.tokens))
        assert all(share.position == batch.position for share in shares)


# ---- from files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [True, False])
def test_rows_of_a_file_are_packed_whole_with_their_margins(tmp_path, chatml, share):
    config = Config(train=write(tmp_path / "rows.jsonl", preferences(40)), max_length=32, cache=str(tmp_path))
    rows, held, report = load_pairs(config, chatml, "preference", share_prompt=share)
    found = [pair for row in rows for pair in unpacked(row)]
    assert held is None
    assert len(found) == len(set(found)) == 40
    assert set(found) == expected(rows)
    assert rows.length == 64
    assert rows.most == max(len(unpacked(row)) for row in rows) > 1
    for number, value, *sides in found:
        texts = [chatml.decode([i for i, learned, _ in side if learned]) for side in sides]
        row = preferences(40)[number]
        assert texts == [row["chosen"] + END, row["rejected"] + END]
        assert value == row["margin"]
    tokens = sum(int((row.segments > 0).sum()) for row in rows)
    both = sum(len(side) for _, _, *sides in found for side in sides)
    assert report.tokens == both == tokens + report.shared
    assert (report.shared > 0) == share
    assert report.trained_tokens == sum(int(row.mask.sum()) for row in rows)
    assert report.efficiency == tokens / (64 * len(rows)) > 0.8
    assert dict(report.lines())["prompt shared"] == f"{report.shared:,} tokens not computed twice"


def test_without_packing_a_row_is_one_pair_and_no_longer_than_the_longest_needs(tmp_path, chatml):
    rows = opened(tmp_path, chatml, preferences(9), packing=False).train
    assert (len(rows), rows.most, rows.length) == (9, 1, 64)
    assert [int(row.row[0]) for row in rows] == list(range(9))
    assert {pair for row in rows for pair in unpacked(row)} == expected(rows)


def test_a_row_that_comes_twice_is_one_pair_in_two_places(tmp_path, chatml):
    path = write(tmp_path / "rows.jsonl", preferences(7))
    once, twice = (
        load_pairs(
            Config(train=[data.Source(path, epochs=n)], max_length=64, cache=str(tmp_path)), chatml, "preference"
        )
        for n in (1, 2)
    )
    assert len(twice.train.documents) == 7
    assert Counter(p for row in twice.train for p in unpacked(row)) == Counter(dict.fromkeys(expected(once.train), 2))
    assert twice.report.shared == 2 * once.report.shared
    assert twice.report.documents == 28


@pytest.mark.parametrize("kind", ["preference", "unpaired"])
def test_held_out_rows_are_other_pairs_and_equal_rows_stay_on_one_side(tmp_path, chatml, kind):
    made = preferences(12) if kind == "preference" else judged(12)
    train, held, report = opened(tmp_path, chatml, made + made[:6], kind, val_fraction=0.4)
    answers = lambda rows: {cells_of(rows.document(int(n))) for n in np.unique(rows.documents)}
    assert not answers(train) & answers(held)
    assert len(answers(train) | answers(held)) == len({json.dumps(row) for row in made}) * (1 + (kind == "preference"))
    assert {pair for row in held for pair in unpacked(row)} == expected(held)
    assert report.held_out == len(held.documents)
    assert report.duplicates == 6
    assert len(train.documents) + len(held.documents) == 18
    assert train.digest != held.digest


def test_batches_are_filled_up_with_empty_rows(tmp_path, chatml):
    rows = opened(tmp_path, chatml, preferences(7), max_length=16).train
    (batch,) = batches(rows, len(rows) + 2, seed=0, epochs=1)
    assert [unpacked(row) for row in split(batch)[-2:]] == [[], []]
    assert not batch.tokens.mask[-2:].any()
    assert not batch.tokens.exists[-2:].any()


def test_a_pair_has_the_reference_of_its_number_and_another_one_is_other_data(tmp_path, chatml):
    rows = opened(tmp_path, chatml, preferences(9), max_length=32).train
    given = np.random.default_rng(0).normal(size=(9, 2)).astype(np.float32)
    known = rows.with_reference(given, "a model")
    for row, plain in zip(known, rows, strict=True):
        assert row.reference[row.exists].tolist() == given[row.row[row.exists]].tolist()
        assert not row.reference[~row.exists].any()
        assert not plain.reference.any()
        assert all(np.array_equal(x, y) for x, y in zip(row[:-1], plain[:-1], strict=True))
    position = next(batches(known, 2, seed=0, epochs=None)).position
    assert (
        next(batches(rows.with_reference(given + 1e-7, "a model"), 2, seed=0, epochs=None, position=position)).position
        != position
    )
    for other in (rows, rows.with_reference(given, "another model")):
        with pytest.raises(DataError, match="the data is not that of the checkpoint"):
            batches(other, 2, seed=0, epochs=None, position=position)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.zeros((8, 2)), r"the reference has shape \(8, 2\); expected \(9, 2\), a line a pair"),
        (
            np.where(np.arange(18) == 7, np.nan, -1.0).reshape(9, 2),
            r"the reference of pair 3 is \[-1.0, nan\]; expected",
        ),
    ],
)
def test_a_reference_of_something_else_is_refused(tmp_path, chatml, values, message):
    with pytest.raises(ValueError, match=message):
        opened(tmp_path, chatml, preferences(9)).train.with_reference(values, "a model")


def test_what_decides_the_rows_decides_their_digest(tmp_path, chatml):
    config = lambda **more: Config(train=write(tmp_path / "a.jsonl", preferences(9)), cache=str(tmp_path), **more)
    make = lambda share=True, **more: load_pairs(config(**more), chatml, "preference", share_prompt=share).train.digest
    assert make() == make()
    assert len({make(), make(share=False), make(packing=False), make(max_length=64)}) == 4


# ---- unpaired answers ------------------------------------------------------------------------------------------------


def test_an_unpaired_answer_stands_beside_that_of_the_next_row(tmp_path, chatml):
    rows, _, report = opened(tmp_path, chatml, judged(8), "unpaired")
    made, found = judged(8), sorted(pair for row in rows for pair in unpacked(row))
    assert [number for number, *_ in found] == list(range(8))
    for number, value, *sides in found:
        texts = [chatml.decode([i for i, *_ in side]) for side in sides]
        learned = [chatml.decode([i for i, learned, _ in side if learned]) for side in sides]
        answers = [made[number]["completion"] + END, made[(number + 1) % 8]["completion"] + END]
        assert learned == answers
        assert texts == [made[number]["prompt"] + answer for answer in answers]
        assert value == float(made[number]["label"])
    own = sum(learned for _, _, chosen, _ in found for _, learned, _ in chosen)
    assert report.trained_tokens == own
    assert report.tokens == sum(len(chosen) for _, _, chosen, _ in found)


def test_what_an_answer_stands_beside_does_not_depend_on_how_rows_are_packed(tmp_path, chatml):
    one, other = (opened(tmp_path, chatml, judged(20), "unpaired", packing=packing).train for packing in (True, False))
    assert {p for row in one for p in unpacked(row)} == {p for row in other for p in unpacked(row)}


def test_the_answer_of_another_row_is_cut_where_both_would_be_too_long(tmp_path, chatml):
    made = [
        {"prompt": words(10), "completion": " a", "label": True},
        {"prompt": "b", "completion": f" {words(12)}", "label": False},
    ]
    rows = opened(tmp_path, chatml, made, "unpaired", max_length=16).train
    chosen, other = rows.pair(0)
    prompt = int(chosen.mask.argmax())
    assert len(other.ids) == 16
    assert other.ids[:prompt].tolist() == chosen.ids[:prompt].tolist()
    answer = rows.pair(1)[0]
    assert other.ids[prompt:].tolist() == answer.ids[answer.mask][: 16 - prompt].tolist()
    assert other.mask.tolist() == [False] * prompt + [True] * (16 - prompt)
    assert int(max(row.positions.max() for row in rows)) < 16


def test_the_other_answer_is_to_another_prompt_even_where_both_answers_to_one_stand_side_by_side():
    prompts = [3, 3, 1, 1, 1, 2, 3]
    found = elsewhere(prompts)
    for i, other in enumerate(found.tolist()):
        between = [(i + step) % 7 for step in range(1, (other - i) % 7)]
        assert prompts[other] != prompts[i]
        assert all(prompts[j] == prompts[i] for j in between)
    assert elsewhere([4, 4, 4]) is None


@pytest.mark.parametrize("held", [False, True])
def test_one_answer_alone_is_refused(tmp_path, chatml, held):
    name = "data.val_fraction" if held else "data.train"
    with pytest.raises(
        DataError, match=f"{name} has answers to one prompt alone, and each is scored beside that to another"
    ):
        opened(tmp_path, chatml, judged(5 if held else 1), "unpaired", val_fraction=0.2 if held else 0.0)


# ---- rows that cannot be used ----------------------------------------------------------------------------------------

CUT = {"prompt": "a", "chosen": f" {words(20)} b", "rejected": f" {words(20)} c"}


@pytest.mark.parametrize(
    ("row", "kind", "options", "message"),
    [
        ({"instruction": "a", "output": "b"}, "preference", {}, "holds a conversation .alpaca.; this run takes prefer"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "unpaired", {}, "this run takes answers with a label"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "preference", {}, "chosen and rejected are the same"),
        ({"prompt": "a", "completion": "b", "label": 1}, "unpaired", {}, "label is 1; expected true or false"),
        (CUT, "preference", {"max_length": 9}, "have the same tokens when cut; raise data.max_length, which is 9"),
        ({"prompt": words(50), "chosen": " a", "rejected": " b"}, "preference", {"max_length": 3}, "leaves none that"),
    ],
)
def test_rows_that_cannot_be_used_are_named(tmp_path, chatml, row, kind, options, message):
    with pytest.raises(DataError, match=f"rows.jsonl line 1: .*{message}"):
        opened(tmp_path, chatml, [row], kind, **options)


def test_an_empty_answer_without_a_stop_token_is_named(tmp_path, make):
    template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content }}{% endfor %}{{ 'assistant: ' * add_generation_prompt }}"
    )
    say = lambda text: [{"role": "assistant", "content": text}]
    row = {"prompt": [{"role": "user", "content": "hello"}], "chosen": say("good"), "rejected": say("")}
    with pytest.raises(DataError, match="rows.jsonl line 1: no token is learned: the answer is empty"):
        opened(tmp_path, make(eos_token=END, chat_template=template), [row])


def test_prompts_are_not_to_be_learned(tmp_path, chatml):
    with pytest.raises(DataError, match="data.learn is all, and of a pair only the answers are judged; choose answers"):
        opened(tmp_path, chatml, preferences(3), learn="all")


def test_long_pairs_are_cut_alike(tmp_path, chatml):
    row = {"prompt": words(60), "chosen": f" a {words(9)}", "rejected": f" b {words(20)}"}
    chosen, rejected = opened(tmp_path, chatml, [row], max_length=32).train.pair(0)
    start = int(chosen.mask.argmax())
    assert start == int(rejected.mask.argmax()) > 0
    assert np.array_equal(chosen.ids[:start], rejected.ids[:start])
    assert max(len(chosen.ids), len(rejected.ids)) == 32


def test_thoughts_that_are_not_learned_belong_to_the_answers(tmp_path, chatml):
    say = lambda thought, text: [{"role": "assistant", "content": f"<think>{thought}</think>{text}"}]
    row = {"prompt": [{"role": "user", "content": "hi"}], "chosen": say("kind", "good"), "rejected": say("be", "bye")}
    (pair,) = unpacked(opened(tmp_path, chatml, [row], reasoning="mask").train[0])
    learned = [chatml.decode([i for i, learned, _ in side if learned]) for side in pair[2:]]
    assert learned == [f"good{END}", f"bye{END}"]
    assert [chatml.decode([i for i, *_ in side]).count("</think>") for side in pair[2:]] == [1, 1]


# ---- for people ------------------------------------------------------------------------------------------------------


def test_a_pair_is_a_question_whose_wanted_answer_is_the_chosen_one(tmp_path, chatml):
    say = lambda role, text: [{"role": role, "content": text}]
    made = [
        {
            "prompt": say("user", f"hello {i}"),
            "chosen": say("assistant", f"good {i}"),
            "rejected": say("assistant", "bye"),
        }
        for i in range(9)
    ]
    rows = opened(tmp_path, chatml, made).train
    found = comparisons(rows, chatml, 3)
    assert [(one.question.text, one.question.answer, one.rejected, one.pair) for one in found] == [
        (f"hello {i}", f"good {i}", "bye", i) for i in (0, 4, 8)
    ]
    asked = f"<|im_start|>user\nhello 4{END}\n<|im_start|>assistant\n"
    assert chatml.decode(found[1].question.ids) == asked
    assert questions(rows, chatml, 3) == [one.question for one in found]
    assert questions(rows, chatml, 0) == []


# ---- published rows --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dropped"),
    [("rm_hh_harmless/harmless_base_test.jsonl", 0), ("sft_pref_rasbt/instruction-data-with-preference.json", 6)],
)
def test_published_preferences_are_packed_tight_and_a_third_is_not_computed_twice(shared, tmp_path, name, dropped):
    tokenizer = data.with_template(hub.load_tokenizer(str(shared / "tokenizers" / "smollm2_135m_instruct")))
    config = Config(train=str(shared / name), max_length=512, on_bad_row="skip", cache=str(tmp_path))
    rows, _, report = load_pairs(config, tokenizer, "preference")
    assert {pair for row in rows for pair in unpacked(row)} == expected(rows)
    assert report.dropped == dropped  # those whose answers are the same
    assert report.efficiency > 0.97
    assert report.shared > 0.35 * report.tokens
