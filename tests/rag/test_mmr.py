import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxsft.rag import mmr


def by_hand(relevance, vectors, k, diversity):
    """Carbonell and Goldstein's definition, one candidate at a time."""
    low, high = min(relevance), max(relevance)
    worth = [(value - low) / (high - low) if high > low else 1.0 for value in relevance]
    chosen = []
    while len(chosen) < min(k, len(worth)):
        scores = {}
        for i in set(range(len(worth))) - set(chosen):
            twin = max((float(vectors[i] @ vectors[j]) for j in chosen), default=None)
            scores[i] = worth[i] if twin is None else (1 - diversity) * worth[i] - diversity * twin
        chosen.append(max(sorted(scores), key=scores.__getitem__))
    return chosen


@given(st.integers(1, 12), st.integers(1, 14), st.sampled_from([0.0, 0.3, 0.7, 1.0]), st.integers(0, 1000))
def test_each_choice_is_the_best_by_the_definition(count, k, diversity, seed):
    draw = np.random.default_rng(seed)
    vectors = draw.standard_normal((count, 4))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    relevance = draw.standard_normal(count)
    assert mmr.select(relevance, vectors, k, diversity) == by_hand(relevance, vectors, k, diversity)


def test_without_diversity_it_is_the_order_of_relevance():
    relevance = np.array([0.1, 0.9, 0.5])
    assert mmr.select(relevance, np.eye(3), 3, 0.0) == [1, 2, 0]


def test_nothing_to_choose_from_and_a_share_that_is_none():
    assert mmr.select(np.zeros(0), np.zeros((0, 3)), 2, 0.5) == []
    with pytest.raises(ValueError, match=r"diversity is 1.5; give a number from 0"):
        mmr.select(np.ones(1), np.eye(1), 1, 1.5)
