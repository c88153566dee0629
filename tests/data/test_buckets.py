import itertools
import json
from collections import Counter
from itertools import islice

import numpy as np
import pytest

from jaxsft.data import Config, DataError, batches_by_length, load_rows
from jaxsft.data.buckets import ALIGN, edges
from jaxsft.types import Judged, Pairs, Prompts


def words(count):
    return " ".join(["hello"] * count)


def write(tmp_path, rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return str(path)


def opened(tmp_path, tokenizer, rows, kind, **options):
    return load_rows(Config(train=write(tmp_path, rows), **options), tokenizer, kind)


@pytest.fixture
def pairs(tmp_path, chatml):
    rows = [
        {"prompt": f"p{i} {words(i % 4)}", "chosen": f" c{i} {words(3 * i)}", "rejected": f" r{i}", "margin": i / 2}
        for i in range(23)
    ]
    return opened(tmp_path, chatml, rows, "preference").train


def cells(side):
    """(ids, learned) of every row that is not empty, as the batch holds it."""
    found = []
    for tokens, mask, segments in zip(side.tokens, side.mask, side.segments, strict=True):
        here = segments > 0
        if here.any():
            found.append((tuple(tokens[here].tolist()), tuple(mask[here].tolist())))
    return found


def test_edges_cost_least_of_all_choices():
    draw = np.random.default_rng(0)
    for _ in range(20):
        lengths = draw.integers(1, 7 * ALIGN, size=12)
        aligned = sorted({-(-int(n) // ALIGN) * ALIGN for n in lengths})
        cost = lambda ends, lengths=lengths: sum(next(e for e in sorted(ends) if e >= n) for n in lengths)
        least = min(
            cost((*some, aligned[-1]))
            for most in range(3)
            for some in itertools.combinations(aligned[:-1], min(most, len(aligned) - 1))
        )
        found = edges(lengths, most=3)
        assert len(found) <= 3
        assert cost(found.tolist()) == least


def test_a_pair_is_prompt_and_answer_on_both_sides(tmp_path, chatml):
    row = {"prompt": [{"role": "user", "content": "hello"}]}
    row |= {side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    rows = opened(tmp_path, chatml, [row | {"margin": 2}], "preference").train
    batch = next(batches_by_length(rows, 1, seed=None, epochs=1)).tokens
    assert isinstance(batch, Pairs)
    for name in ("chosen", "rejected"):
        side = getattr(batch, name)
        assert chatml.decode(side.tokens[0][side.mask[0]]) == f"{name}<|im_end|>"
        assert chatml.decode(side.tokens[0][side.segments[0] > 0]).startswith("<|im_start|>user\nhello<|im_end|>")
    assert batch.margin.tolist() == [2.0]


@pytest.mark.parametrize("seed", [None, 5])
@pytest.mark.parametrize("epochs", [1, 3])
@pytest.mark.parametrize("size", [1, 4, 32])
def test_every_pair_comes_once_an_epoch(pairs, seed, epochs, size):
    found = list(batches_by_length(pairs, size, seed=seed, epochs=epochs))
    per_epoch = -(-len(pairs) // size)
    assert len(found) == epochs * per_epoch
    for epoch in range(epochs):
        batches = found[epoch * per_epoch : (epoch + 1) * per_epoch]
        margins = Counter(
            float(m) for b in batches for m, s in zip(b.tokens.margin, b.tokens.chosen.segments, strict=True) if s.any()
        )
        assert margins == Counter(i / 2 for i in range(23))
    chosen = {cell for batch in found for cell in cells(batch.tokens.chosen)}
    assert len(chosen) == 23
    assert all(
        batch.count == (batch.tokens.chosen.segments > 0).sum() + (batch.tokens.rejected.segments > 0).sum()
        for batch in found
    )


def test_rows_of_one_length_share_a_batch_and_few_lengths_are_compiled(pairs):
    found = list(batches_by_length(pairs, 4, seed=1, epochs=5))
    lengths = {batch.tokens.chosen.tokens.shape[1] for batch in found}
    assert lengths == set(edges(pairs.lengths).tolist()) & lengths
    assert len(lengths) <= 6
    alone = {}
    for batch in found:
        for ids, _ in cells(batch.tokens.chosen):
            alone.setdefault(ids, set()).add(batch.tokens.chosen.tokens.shape[1])
    ends = edges(pairs.lengths)
    for ids, seen in alone.items():
        own = ends[np.searchsorted(ends, len(ids))]
        assert own in seen or min(seen) > own
        assert min(seen) >= len(ids)


def test_an_epoch_draws_other_batches(pairs):
    found = list(batches_by_length(pairs, 4, seed=1, epochs=2))
    half = len(found) // 2
    groups = lambda batches: {frozenset(b.tokens.margin.tolist()) for b in batches}
    assert groups(found[:half]) != groups(found[half:])
    again = list(batches_by_length(pairs, 4, seed=1, epochs=2))
    assert all(np.array_equal(a.tokens.margin, b.tokens.margin) for a, b in zip(found, again, strict=True))


@pytest.mark.parametrize("processes", [1, 2])
def test_resuming_after_any_batch_is_as_if_never_stopped(pairs, processes):
    for process in range(processes):
        own = {"seed": 3, "epochs": None, "process": process, "processes": processes}
        whole = list(islice(batches_by_length(pairs, 4, **own), 9))
        for at, batch in enumerate(whole):
            position = json.loads(json.dumps(batch.position))
            rest = list(islice(batches_by_length(pairs, 4, **own, position=position), len(whole) - at - 1))
            for one, other in zip(rest, whole[at + 1 :], strict=True):
                assert np.array_equal(one.tokens.chosen.tokens, other.tokens.chosen.tokens)
                assert one.position == other.position


def test_processes_share_each_batch(pairs):
    whole = list(batches_by_length(pairs, 4, seed=3, epochs=2))
    parts = [list(batches_by_length(pairs, 4, seed=3, epochs=2, process=p, processes=2)) for p in range(2)]
    for batch, *shares in zip(whole, *parts, strict=True):
        joined = np.concatenate([share.tokens.rejected.tokens for share in shares])
        assert np.array_equal(batch.tokens.rejected.tokens, joined)


def test_judged_answers_keep_their_label(tmp_path, chatml):
    rows = [{"prompt": "a", "completion": f" {words(i)}", "label": i % 2 == 0} for i in range(1, 8)]
    found = list(batches_by_length(opened(tmp_path, chatml, rows, "unpaired").train, 2, seed=0, epochs=1))
    assert all(isinstance(batch.tokens, Judged) for batch in found)
    labels = [
        bool(label)
        for batch in found
        for label, segments in zip(batch.tokens.label, batch.tokens.answers.segments, strict=True)
        if segments.any()
    ]
    assert sorted(labels) == [False] * 4 + [True] * 3


def test_prompts_keep_the_other_columns_for_the_reward(tmp_path, chatml):
    rows = [{"prompt": [{"role": "user", "content": words(i)}], "answer": str(i)} for i in range(1, 6)]
    rows.append({"instruction": "hello", "output": "the last answer"})
    loaded = opened(tmp_path, chatml, rows, "prompt").train
    seen = {}
    for batch in batches_by_length(loaded, 4, seed=0, epochs=1):
        assert isinstance(batch.tokens, Prompts)
        for tokens, length, row in zip(*batch.tokens, strict=True):
            if row >= 0:
                seen[chatml.decode(tokens[:length])] = loaded.fields(int(row))
            else:
                assert length == 0
    expected = {words(i): {"answer": str(i)} for i in range(1, 6)} | {"hello": {"answer": "the last answer"}}
    assert seen == {f"<|im_start|>user\n{w}<|im_end|>\n<|im_start|>assistant\n": f for w, f in expected.items()}


def test_the_report_says_what_padding_costs(tmp_path, chatml):
    rows = [{"prompt": "a", "chosen": f" b{words(i)}", "rejected": " c"} for i in range(40)]
    loaded = opened(tmp_path, chatml, rows, "preference")
    slots = 2 * sum(
        int(edges(loaded.train.lengths)[np.searchsorted(edges(loaded.train.lengths), n)]) for n in loaded.train.lengths
    )
    assert loaded.report.efficiency == pytest.approx(loaded.report.tokens / slots)


def test_long_pairs_are_cut_alike(tmp_path, chatml):
    row = {"prompt": words(60), "chosen": f" {words(9)}", "rejected": f" {words(20)} x"}
    batch = next(
        batches_by_length(opened(tmp_path, chatml, [row], "preference", max_length=32).train, 1, seed=None, epochs=1)
    )
    chosen, rejected = batch.tokens.chosen, batch.tokens.rejected
    start = int(chosen.mask[0].argmax())
    assert start == int(rejected.mask[0].argmax()) > 0
    assert np.array_equal(chosen.tokens[0, :start], rejected.tokens[0, :start])


@pytest.mark.parametrize(
    ("rows", "kind", "message"),
    [
        (
            [{"instruction": "a", "output": "b"}],
            "preference",
            "holds a conversation .alpaca.; this run takes preferences",
        ),
        ([{"prompt": "a", "chosen": "b", "rejected": "b"}], "preference", "chosen and rejected are the same"),
        ([{"prompt": "a " * 400}], "prompt", "the prompt has .* tokens; raise data.max_length, which is 64"),
        ([{"prompt": "a", "completion": "b", "label": 1}], "unpaired", "label is 1; expected true or false"),
    ],
)
def test_rows_that_cannot_be_used_are_named(tmp_path, chatml, rows, kind, message):
    with pytest.raises(DataError, match=message):
        opened(tmp_path, chatml, rows, kind, max_length=64)


def test_a_batch_must_divide_by_the_processes(pairs):
    with pytest.raises(DataError, match=r"train.batch_size is 3; it must be a multiple of the 2 processes"):
        batches_by_length(pairs, 3, seed=0, epochs=1, processes=2)
