import numpy as np
import pytest

from jaxsft.data import DataError, batches
from jaxsft.rag import teach
from jaxsft.rag.embed import Embedder
from jaxsft.rag.examples import Example

CORPUS = ["a", "b", "c", "d", "e"]


def embedder(vectors: dict[str, list[float]]) -> Embedder:
    unit = {text: np.array(x, np.float32) / np.linalg.norm(x) for text, x in vectors.items()}
    look = lambda texts: np.stack([unit[text] for text in texts])
    return Embedder("table", "", 2, 99, None, look, look, len, lambda text: 0.0)


# By cosine with q: a 1, b 0.9, c 0.8, d 0, e -1.
PLACES = embedder({
    "q": [1, 0], "a": [1, 0], "b": [0.9, 0.19**0.5], "c": [0.8, -0.6], "d": [0, 1], "e": [-1, 0], "r": [0, 1],
})  # fmt: skip


@pytest.mark.parametrize(("positive", "below", "count", "expected"), [
    ("a", 0.95, 2, ("b", "c")),
    ("a", 0.85, 2, ("c", "d")),
    ("a", 0.95, 9, ("b", "c", "d", "e")),
    ("c", 0.95, 2, ("d", "e")),  # a and b are nearer than the right passage
])  # fmt: skip
def test_mined_are_the_nearest_below_a_share_of_the_right_ones_similarity(positive, below, count, expected):
    (found,) = teach.mine(PLACES, [Example("q", positive)], CORPUS, count, below=below)
    assert found == Example("q", positive, expected)


def test_what_is_right_in_another_row_or_there_already_is_not_mined():
    rows = [Example("q", "a", ("c",)), Example("q", "b"), Example("r", "d")]
    found = teach.mine(PLACES, rows, CORPUS, 1)
    assert found[0].negatives == ("c", "d")  # its own first
    assert found[1].negatives == ("c",)
    assert found[2].negatives == ("b",)
    assert rows[1].negatives == ()


def test_a_rank_counts_what_is_nearer_than_the_best_right_passage():
    rows = [Example("q", "c"), Example("q", "e"), Example("r", "d"), Example("a", "c")]
    assert teach.ranks(PLACES, rows, CORPUS).tolist() == [3, 1, 3]
    tied = embedder({text: [1, 0] for text in [*CORPUS, "q"]})
    assert teach.ranks(tied, [Example("q", "a")], CORPUS).tolist() == [5]
    with pytest.raises(DataError, match="the corpus does not have the passage 'z'"):
        teach.ranks(PLACES, [Example("q", "z")], CORPUS)


def test_rows_hold_the_right_passage_then_negatives_then_nothing():
    write = lambda texts: [[ord(x) for x in text] for text in texts]
    rows = [Example("ab", "x", ("yy", "z", "w")), Example("c", "yy"), Example("ddd", "x")]
    made = teach.to_rows(rows, write, write, negatives=2)
    (first, last) = batches(made, 2, seed=None, epochs=1)
    assert first.tokens.queries[:, :3].tolist() == [[97, 98, 0], [99, 0, 0]]
    assert first.tokens.texts.tolist() == [[0, 1, 2], [1, -1, -1]]
    assert first.tokens.passages[0, :, :2].tolist() == [[120, 0], [121, 121], [122, 0]]
    assert first.tokens.passage_sizes.tolist() == [[1, 2, 1], [2, 0, 0]]
    assert first.count == 2 + 1 + 1 + 2 + 1 + 2
    assert last.tokens.texts.tolist() == [[0, -1, -1], [-1, -1, -1]]
    assert (last.tokens.query_sizes.tolist(), last.count) == ([[3], [0]], 4)
    with pytest.raises(DataError, match="no token that the model knows"):
        teach.to_rows([Example("", "x")], write, write)
    with pytest.raises(DataError, match="there are no rows to learn from"):
        teach.to_rows([], write, write)
