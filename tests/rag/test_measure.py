import numpy as np

from jaxsft.rag import measure

FOUND = {"a": ["x", "y", "y", "z"], "b": ["q", "y", "x"], "c": []}
RIGHT = {"a": {"y", "w"}, "b": {"q"}, "c": {"x"}, "d": {"x"}}


def test_the_measures_are_those_of_their_definitions():
    found = measure.measure(FOUND, RIGHT, ["R@1", "R@2", "RR@10", "nDCG@10"])
    for question, right in RIGHT.items():
        order = list(dict.fromkeys(FOUND.get(question, [])))
        ranks = [rank for rank, one in enumerate(order, 1) if one in right]
        ideal = sum(1 / np.log2(rank + 1) for rank in range(1, len(right) + 1))
        assert found["R@1"][question] == sum(rank <= 1 for rank in ranks) / len(right)
        assert found["R@2"][question] == sum(rank <= 2 for rank in ranks) / len(right)
        assert found["RR@10"][question] == (1 / ranks[0] if ranks else 0.0)
        np.testing.assert_allclose(found["nDCG@10"][question], sum(1 / np.log2(rank + 1) for rank in ranks) / ideal)


def test_the_interval_of_a_share_is_about_the_normal_one():
    values = np.array([1.0] * 80 + [0.0] * 20)
    mean, low, high = measure.interval(values)
    half = 1.96 * np.sqrt(0.8 * 0.2 / 100)
    assert mean == 0.8
    np.testing.assert_allclose([low, high], [0.8 - half, 0.8 + half], atol=0.015)
