import itertools
import json
from collections import Counter
from itertools import islice

import numpy as np
import pytest

from jaxsft.data import Config, DataError, batches_by_length, load_prompts
from jaxsft.data.buckets import ALIGN, edges
from jaxsft.types import Prompts

from .conftest import write


def words(count):
    return " ".join(["hello"] * count)


def opened(tmp_path, tokenizer, rows, **options):
    return load_prompts(Config(train=write(tmp_path / "rows.jsonl", rows), **options), tokenizer)


@pytest.fixture
def prompts(tmp_path, chatml):
    rows = [{"prompt": f"p{i} {words(3 * i)}", "answer": str(i)} for i in range(23)]
    return opened(tmp_path, chatml, rows).train


def cells(batch):
    """(number, ids) of every row that is not empty, as the batch holds it."""
    return [
        (row, tuple(tokens[:size].tolist()))
        for tokens, size, row in zip(batch.tokens, batch.lengths.tolist(), batch.rows.tolist(), strict=True)
        if row >= 0
    ]


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


@pytest.mark.parametrize("seed", [None, 5])
@pytest.mark.parametrize("epochs", [1, 3])
@pytest.mark.parametrize("size", [1, 4, 32])
def test_every_prompt_comes_once_an_epoch(prompts, seed, epochs, size):
    found = list(batches_by_length(prompts, size, seed=seed, epochs=epochs))
    per_epoch = -(-len(prompts) // size)
    assert len(found) == epochs * per_epoch
    whole = Counter((i, tuple(prompts.document(int(n)).ids.tolist())) for i, n in enumerate(prompts.documents))
    for epoch in range(epochs):
        batches = found[epoch * per_epoch : (epoch + 1) * per_epoch]
        assert Counter(cell for batch in batches for cell in cells(batch.tokens)) == whole
    assert all(batch.count == sum(len(ids) for _, ids in cells(batch.tokens)) for batch in found)


def test_rows_of_one_length_share_a_batch_and_few_lengths_are_compiled(prompts):
    found = list(batches_by_length(prompts, 4, seed=1, epochs=5))
    ends = edges(prompts.lengths)
    assert {batch.tokens.tokens.shape[1] for batch in found} <= set(ends.tolist())
    assert len(ends) <= 6
    alone = {}
    for batch in found:
        for row, ids in cells(batch.tokens):
            alone.setdefault((row, len(ids)), set()).add(batch.tokens.tokens.shape[1])
    for (_, length), seen in alone.items():
        own = ends[np.searchsorted(ends, length)]
        assert own in seen or min(seen) > own
        assert min(seen) >= length


def test_an_epoch_draws_other_batches(prompts):
    found = list(batches_by_length(prompts, 4, seed=1, epochs=2))
    half = len(found) // 2
    groups = lambda batches: {frozenset(b.tokens.rows.tolist()) for b in batches}
    assert groups(found[:half]) != groups(found[half:])
    again = list(batches_by_length(prompts, 4, seed=1, epochs=2))
    assert all(np.array_equal(a.tokens.rows, b.tokens.rows) for a, b in zip(found, again, strict=True))


@pytest.mark.parametrize("processes", [1, 2])
def test_resuming_after_any_batch_is_as_if_never_stopped(prompts, processes):
    for process in range(processes):
        own = {"seed": 3, "epochs": None, "process": process, "processes": processes}
        whole = list(islice(batches_by_length(prompts, 4, **own), 9))
        for at, batch in enumerate(whole):
            position = json.loads(json.dumps(batch.position))
            rest = list(islice(batches_by_length(prompts, 4, **own, position=position), len(whole) - at - 1))
            for one, other in zip(rest, whole[at + 1 :], strict=True):
                assert np.array_equal(one.tokens.tokens, other.tokens.tokens)
                assert one.position == other.position


def test_processes_share_each_batch(prompts):
    whole = list(batches_by_length(prompts, 4, seed=3, epochs=2))
    parts = [list(batches_by_length(prompts, 4, seed=3, epochs=2, process=p, processes=2)) for p in range(2)]
    for batch, *shares in zip(whole, *parts, strict=True):
        joined = np.concatenate([share.tokens.tokens for share in shares])
        assert np.array_equal(batch.tokens.tokens, joined)


def test_prompts_keep_the_other_columns_for_the_reward(tmp_path, chatml):
    rows = [{"prompt": [{"role": "user", "content": words(i)}], "answer": str(i)} for i in range(1, 6)]
    rows.append({"instruction": "hello", "output": "the last answer"})
    loaded = opened(tmp_path, chatml, rows).train
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
    loaded = opened(tmp_path, chatml, [{"prompt": f"a{words(i)}"} for i in range(40)])
    ends = edges(loaded.train.lengths).tolist()
    slots = sum(next(end for end in ends if end >= length) for length in loaded.train.lengths)
    assert loaded.report.efficiency == pytest.approx(loaded.report.tokens / slots)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a " * 400}, "the prompt has .* tokens; raise data.max_length, which is 64"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "holds a preference .preference.; this run takes prompts"),
    ],
)
def test_rows_that_cannot_be_used_are_named(tmp_path, chatml, row, message):
    with pytest.raises(DataError, match=f"rows.jsonl line 1: .*{message}"):
        opened(tmp_path, chatml, [row], max_length=64)


def test_a_batch_must_divide_by_the_processes(prompts):
    with pytest.raises(DataError, match=r"train.batch_size is 3; it must be a multiple of the 2 processes"):
        batches_by_length(prompts, 3, seed=0, epochs=1, processes=2)
