import time
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from jaxsft.data.pack import chunks, fill, plan, truncate
from jaxsft.data.render import Example


def turns(*lengths):
    """Example of question, answer, question, ... of these lengths, ids counting up."""
    mask = np.concatenate([np.full(length, i % 2 == 1) for i, length in enumerate(lengths)])
    return Example(np.arange(len(mask), dtype=np.int32), mask)


def llama_factory(pairs, cutoff):
    """The loop of LLaMA-Factory's SupervisedDatasetProcessor, on lists."""
    ids, mask = [], []
    for source, target in pairs:
        if len(ids) >= cutoff:
            break
        room = cutoff - len(ids)
        if len(target) * 2 < room:
            most = room
        elif len(source) * 2 < room:
            most = room - len(source)
        else:
            most = int(room * (len(target) / (len(source) + len(target))))
        target_length = min(most, len(target))
        source_length = min(max(room - target_length, 0), len(source))
        ids += source[:source_length] + target[:target_length]
        mask += [False] * source_length + [True] * target_length
    return ids, mask


def test_truncation_is_that_of_llama_factory():
    random = np.random.default_rng(0)
    for _ in range(300):
        lengths = random.integers(1, 30, size=2 * random.integers(1, 4)).tolist()
        example, cutoff = turns(*lengths), int(random.integers(2, 60))
        cuts = np.cumsum([0, *lengths])
        parts = [example.ids[a:b].tolist() for a, b in pairwise(cuts)]
        ids, mask = llama_factory(list(zip(parts[::2], parts[1::2], strict=True)), cutoff)
        cut = truncate(example, cutoff)
        assert (cut.ids.tolist(), cut.mask.tolist()) == (ids, mask)
        assert len(cut.ids) <= cutoff
        assert all(example.mask[i] == learned for i, learned in zip(*cut, strict=True))  # each token keeps its mask


@pytest.mark.parametrize(
    ("lengths", "kept"),
    [((8, 2), (4, 2)), ((2, 8), (2, 4)), ((6, 6), (3, 3)), ((2, 2, 2, 2), (2, 2, 1, 1)), ((3, 3), (3, 3))],
)
def test_question_answer_or_both_are_cut(lengths, kept):
    cut = truncate(turns(*lengths), 6)
    assert cut.mask.tolist() == turns(*kept).mask.tolist()


@pytest.mark.parametrize("length", [1, 2, 3, 7, 8, 9, 15, 16, 50])
@pytest.mark.parametrize("max_length", [2, 3, 8])
def test_chunks_learn_each_token_of_a_text_once(length, max_length):
    text = Example(np.arange(length, dtype=np.int32), np.arange(length) > 0)
    pieces = chunks(text, max_length)
    learned = [number for ids, mask in pieces for number in ids[mask].tolist()]
    assert learned == list(range(1, length))
    assert all(len(ids) <= max_length and not mask[0] for ids, mask in pieces)
    for before, after in pairwise(pieces):
        assert before.ids[-1] == after.ids[0]  # the token after is predicted from it


def planned(lengths, max_length):
    order, rows = plan(np.array(lengths, int), max_length)
    return [order[a:b].tolist() for a, b in pairwise(rows)]


def best_fit(lengths, max_length):
    """Best fit decreasing by looking at every row."""
    spaces = []
    for length in sorted(lengths, reverse=True):
        fitting = [space for space in spaces if space >= length]
        if fitting:
            spaces[spaces.index(min(fitting))] -= length
        else:
            spaces.append(max_length - length)
    return len(spaces)


def test_plan_is_best_fit_and_places_each_document_once():
    random = np.random.default_rng(0)
    for _ in range(50):
        lengths = random.integers(1, 33, size=random.integers(0, 80)).tolist()
        rows = planned(lengths, 32)
        assert sorted(document for row in rows for document in row) == list(range(len(lengths)))
        assert all(sum(lengths[document] for document in row) <= 32 for row in rows)
        assert len(rows) == best_fit(lengths, 32)


def test_plan_is_fast_and_tight_on_a_hundred_thousand_answers():
    lengths = np.random.default_rng(0).lognormal(5, 0.8, 100_000).astype(int).clip(8, 1024)
    start = time.perf_counter()
    _, rows = plan(lengths, 1024)
    assert time.perf_counter() - start < 3
    assert sum(lengths) / ((len(rows) - 1) * 1024) > 0.97


def test_plan_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="a document has 9 tokens, a row 8; truncate it"):
        plan(np.array([3, 9]), 8)
    with pytest.raises(ValueError, match="a document has no tokens"):
        plan(np.array([3, 0]), 8)


def test_fill_writes_what_tokens_documents():
    row = fill([turns(1, 1), turns(1, 2)], 6)
    assert [array.astype(int).tolist() for array in row] == [
        [0, 1, 0, 1, 2, 0],
        [0, 1, 0, 1, 1, 0],
        [0, 1, 0, 1, 2, 0],
        [1, 1, 2, 2, 2, 0],
    ]
    assert [array.dtype.name for array in row] == ["int32", "bool", "int32", "int32"]


def test_a_document_may_begin_at_any_position_and_an_empty_one_takes_a_number():
    nothing = Example(np.zeros(0, np.int32), np.zeros(0, bool))
    row = fill([turns(1, 1), nothing, turns(1, 2)], 6, [0, 0, 4])
    assert row.positions.tolist() == [0, 1, 4, 5, 6, 0]
    assert row.segments.tolist() == [1, 1, 3, 3, 3, 0]


def test_documents_survive_packing_in_any_order():
    random = np.random.default_rng(0)
    documents = [turns(*random.integers(1, 6, size=4)) for _ in range(6)]
    seen = []
    for order in (range(6), random.permutation(6)):
        row = fill([documents[i] for i in order], 128)
        found = Counter()
        for number in range(1, row.segments.max() + 1):
            here = row.segments == number
            assert row.positions[here].tolist() == list(range(here.sum()))
            found[tuple(row.tokens[here].tolist()), tuple(row.mask[here].tolist())] += 1
        seen.append(found)
        assert not row.mask[row.segments == 0].any()
    assert seen[0] == seen[1] == Counter((tuple(d.ids.tolist()), tuple(d.mask.tolist())) for d in documents)
