import pytest

from jaxsft.rewards import length, overlong


def dapo(n: int, most: int, cache: int) -> float:
    """Equation 13 as it is written."""
    if n <= most - cache:
        return 0.0
    return ((most - cache) - n) / cache if n <= most else -1.0


@pytest.mark.parametrize(("limit", "margin"), [(100, 20), (100, 100), (100, 0), (7, 3)])
def test_overlong_is_equation_13_of_dapo(limit, margin):
    for n in range(2 * limit):
        assert overlong("", "", range(n), limit, margin) == pytest.approx(dapo(n, limit, margin), abs=1e-12)


def test_length_is_highest_at_the_target_and_never_below_zero():
    values = [length("", "", range(n), target=10) for n in range(40)]
    assert values.index(max(values)) == 10
    assert values[10] == 1.0
    assert values[0] == values[20] == values[39] == 0.0
    assert values[5] == values[15] == 0.5


def test_lengths_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="target is 0 tokens"):
        length("", "", [], target=0)
    with pytest.raises(ValueError, match="margin is 11 tokens; it must be between 0 and the limit, 10"):
        overlong("", "", [], limit=10, margin=11)
