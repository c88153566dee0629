"""Sums over the answers of packed pairs, against loops over the documents."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxsft import data
from jaxsft.objectives import pairs
from jaxsft.types import Pairs


def document(prompt: int, answer: int, start: int = 5) -> data.Example:
    ids = np.r_[np.arange(5, 5 + prompt), np.arange(start, start + answer)].astype(np.int32)
    return data.Example(ids, np.arange(len(ids)) >= prompt)


@pytest.fixture(scope="module")
def batch() -> Pairs:
    """Two rows: pairs 0 and 1 in the first, pair 2 in the second; answers of 2 and 3, 1 and 4, 5 and 5 tokens."""
    made = [(document(4, a, 30), document(4, b, 60)) for a, b in ((2, 3), (1, 4), (5, 5))]
    rows = data.pairs_in_memory(made, 32, [[0, 1], [2]])
    return Pairs(*(jnp.stack(part) for part in zip(*rows, strict=True)))


def test_learned_tokens_are_counted_for_each_answer(batch):
    targets, learned = pairs.losses.shift(batch.tokens, batch.mask, batch.segments)
    counts = pairs.answers(learned.astype(jnp.float32), batch)
    assert counts.tolist() == [[[2, 3], [1, 4]], [[5, 5], [0, 0]]]
    sums = pairs.answers(jnp.where(learned, targets, 0).astype(jnp.float32), batch)
    assert sums[0, 0].tolist() == [30 + 31, 60 + 61 + 62]
    assert sums[1, 0].tolist() == [sum(range(30, 35)), sum(range(60, 65))]


def test_an_answers_end_is_its_last_token(batch):
    last = pairs.ends(batch.tokens.astype(jnp.float32), batch)
    assert last.tolist() == [[[31, 62], [30, 63]], [[34, 64], [0, 0]]]


def test_the_end_of_an_answer_that_fills_its_row_is_found():
    row = data.pairs_in_memory([(document(2, 2, 30), document(2, 1, 60))], 6)[0]
    full = Pairs(*(jnp.asarray(part)[None] for part in row))
    assert int(full.segments[0, -1]) == 3
    assert pairs.ends(full.tokens.astype(jnp.float32), full).tolist() == [[[31, 60]]]


def test_learned_tokens_are_numbered_within_their_answer(batch):
    _, learned = pairs.losses.shift(batch.tokens, batch.mask, batch.segments)
    numbers = np.where(learned, pairs.index(learned, batch), -1)
    per_answer = [numbers[0][np.asarray(learned[0] & (batch.segments[0] == s))].tolist() for s in (2, 3, 5, 6)]
    assert per_answer == [[0, 1], [0, 1, 2], [0], [0, 1, 2, 3]]


def test_a_value_of_a_pair_reaches_its_tokens(batch):
    values = pairs.spread(jnp.array([[7.0, 8.0], [9.0, 0.0]]), batch)
    assert set(values[0][(batch.segments[0] > 0) & (batch.segments[0] <= 3)].tolist()) == {7.0}
    assert set(values[0][batch.segments[0] > 3].tolist()) == {8.0}
    assert set(values[1][batch.segments[1] > 0].tolist()) == {9.0}


def test_the_reference_is_the_base_without_adapter_and_with_what_trains_as_it_was():
    variables = {
        "params": {"norm": {"scale": 3.0}, "embed": {"table": 1.0}},
        "lora": {"a": 5.0},
        "packed": {"codes": 7.0},
        "reference": {"norm": {"scale": 2.0}},
    }
    assert pairs.reference(variables) == {
        "params": {"norm": {"scale": 2.0}, "embed": {"table": 1.0}},
        "packed": {"codes": 7.0},
    }
    assert pairs.reference({"params": {"w": 1.0}}) == {"params": {"w": 1.0}}
