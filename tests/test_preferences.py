import math

import numpy as np
import pytest

from jaxsft import preferences
from jaxsft.data import Comparison, Question


def test_the_interval_of_a_share_is_wilsons():
    """Against the two roots of (p - q)^2 = z^2 q (1 - q) / n, which define it."""
    hits = np.array([1.0] * 37 + [0.0] * 13)
    found = preferences.share(hits)
    assert found.value == pytest.approx(0.74)
    for end in (found.low, found.high):
        assert (found.value - end) ** 2 == pytest.approx(1.959964**2 * end * (1 - end) / 50, rel=1e-9)


@pytest.mark.parametrize(("hits", "low", "high"), [([1.0] * 9, 0.70085, 1.0), ([0.0] * 9, 0.0, 0.29915)])
def test_a_share_of_all_or_none_is_not_certain(hits, low, high):
    found = preferences.share(np.array(hits))
    assert (found.low, found.high) == (pytest.approx(low, abs=1e-5), pytest.approx(high, abs=1e-5))


def test_nothing_known_is_not_a_share():
    found = preferences.share(np.zeros(0))
    assert math.isnan(found.value)
    assert (found.low, found.high, found.n) == (0.0, 1.0, 0)


def test_calibration_is_what_a_loop_over_pairs_says():
    draw = np.random.default_rng(0)
    margins = 2 * draw.standard_normal(500) + 0.7
    found = preferences.calibration(margins, bins=5)
    error = 0.0
    for b in range(5):
        inside = [m for m in margins if 0.5 + b / 10 <= 1 / (1 + math.exp(-abs(m))) < 0.5 + (b + 1) / 10]
        said = sum(1 / (1 + math.exp(-abs(m))) for m in inside) / len(inside)
        right = sum(m > 0 for m in inside) / len(inside)
        assert found.count[b] == len(inside)
        assert found.sure[b] == pytest.approx(said)
        assert found.right[b] == pytest.approx(right)
        error += abs(said - right) * len(inside) / 500
    assert found.error == pytest.approx(error)


def test_a_model_that_says_what_it_knows_is_calibrated():
    draw = np.random.default_rng(1)
    margins = np.abs(2 * draw.standard_normal(40_000))
    right = draw.uniform(size=margins.size) < 1 / (1 + np.exp(-margins))
    assert preferences.calibration(np.where(right, margins, -margins)).error < 0.02


def test_a_liking_for_length_is_told_and_answers_of_one_length_say_nothing_of_it():
    longer = np.array([3.0, -2.0, 5.0, 0.0, -1.0])
    found = preferences.lengths(longer * 2, longer)
    assert found["prefers the longer"].startswith("100.0% of 4 ")
    assert found["the chosen is longer"].startswith("50.0% of 4 ")
    assert found["margin and length, correlation"] == "+1.00"
    assert preferences.lengths(np.ones(3), np.zeros(3))["margin and length, correlation"] == "unknown"


def test_the_calibration_is_drawn_even_of_a_few_pairs(tmp_path):
    preferences.plot_calibration(np.array([0.5, -0.2]), tmp_path / "calibration.png")
    assert (tmp_path / "calibration.png").read_bytes().startswith(b"\x89PNG")


def test_pairs_are_shown_with_their_numbers(capsys):
    preferences.show({"score before": np.array([-1.0, 1.0]), "score after": np.array([1.0, 2.0])}, np.array([1, 2]))
    shown = [Comparison(Question("a [b]?", [1], "yes"), "no", 7)]
    preferences.compare(shown, np.array([3, 7]), np.array([9.0, 0.5]), np.array([9.0, 1.25]), "margin")
    shown = " ".join(capsys.readouterr().out.split())
    for words in ("score before", "50.0%", "+1.5000", "prefers the longer", "a [b]?", "+0.500", "+1.250"):
        assert words in shown, words
