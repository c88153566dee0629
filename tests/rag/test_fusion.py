import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from jaxsft.rag import fusion

SCORES = st.lists(st.tuples(st.floats(0, 30, width=32), st.floats(-1, 1, width=32)), min_size=1, max_size=8)


@given(SCORES, st.floats(0, 1))
def test_scores_are_a_convex_combination(pairs, weight):
    words, meaning = map(np.array, zip(*pairs, strict=True))
    found, top = fusion.scores(words, meaning, weight), max(words)
    for value, word, cosine in zip(found, words, meaning, strict=True):
        wanted = (1 - weight) * cosine + (weight * word / top if top > 1e-9 else weight * word / 1e-9)
        np.testing.assert_allclose(value, wanted, rtol=1e-6, atol=1e-9)


@given(SCORES, st.integers(1, 100))
def test_ranks_are_those_of_a_sorted_list(pairs, k):
    words, meaning = map(np.array, zip(*pairs, strict=True))
    found = fusion.ranks(words, meaning, k)
    by_words = sorted(range(len(pairs)), key=lambda i: -words[i])
    by_meaning = sorted(range(len(pairs)), key=lambda i: -meaning[i])
    for i, value in enumerate(found):
        wanted = 1 / (k + 1 + by_meaning.index(i)) + (1 / (k + 1 + by_words.index(i)) if words[i] > 0 else 0.0)
        np.testing.assert_allclose(value, wanted, rtol=1e-6)


def test_two_passages_that_each_lead_one_list_are_told_apart_by_their_scores():
    words, meaning = np.array([9.0, 8.9, 1.0]), np.array([0.5, 0.9, 0.1])
    found, scores = fusion.ranks(words, meaning), fusion.scores(words, meaning)
    assert abs(found[0] - found[1]) < 2e-9
    assert scores[1] > scores[0]
    assert found[1] > found[0] > found[2]
    found = fusion.ranks(words[::-1], meaning[::-1])
    assert found[1] > found[2] > found[0]
