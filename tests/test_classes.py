"""Figures of a classifier against loops and, where it is installed, scikit-learn's definitions by hand."""

import html.parser
import json

import numpy as np
import pytest
from PIL import Image

from jaxsft import classes, mistakes

NAMES = ("ant", "bee", "cat", "dog")


@pytest.fixture(scope="module")
def given():
    draw = np.random.default_rng(0)
    labels = np.r_[draw.integers(0, 3, 57), [0, 1, 2]]  # there is no dog
    scores = draw.normal(size=(60, 4)) + 1.5 * np.eye(4)[labels]
    return scores.astype(np.float32), labels


@pytest.fixture(scope="module")
def figures(given):
    return classes.measure(*given, NAMES)


def test_each_figure_is_that_of_a_loop(given, figures):
    scores, labels = given
    called = scores.argmax(-1)
    for k in range(4):
        hits = sum(a == b == k for a, b in zip(called, labels, strict=True))
        said, are = (called == k).sum(), (labels == k).sum()
        assert np.isclose(figures.precision[k], hits / said)
        assert np.isnan(figures.recall[k]) if k == 3 else np.isclose(figures.recall[k], hits / are)
        assert np.isclose(figures.f1[k], 2 * hits / (said + are))
        for other in range(4):
            count = sum(a == k and b == other for a, b in zip(labels, called, strict=True))
            assert figures.confusion[k, other] == count
    assert np.isclose(figures.accuracy.value, (called == labels).mean())
    assert np.isclose(figures.macro_f1, figures.f1[:3].mean())
    logs = [np.log(np.exp(s.astype(float)).sum()) - s[y] for s, y in zip(scores, labels, strict=True)]
    assert np.isclose(figures.loss, np.mean(logs))


def test_the_first_five_of_eight():
    scores, labels = np.tile(-np.arange(8.0), (8, 1)), np.arange(8)
    assert classes.measure(scores, labels, list("abcdefgh")).top5.value == 5 / 8


def test_calibration_is_that_of_a_loop(given):
    scores, labels = given
    chances = classes.probabilities(scores)
    sure, right = chances.max(-1), chances.argmax(-1) == labels
    error = 0.0
    for lower in np.arange(10) / 10:
        inside = (sure >= lower) & (sure < lower + 0.1)
        if inside.any():
            error += inside.mean() * abs(sure[inside].mean() - right[inside].mean())
    assert np.isclose(classes.calibration(sure, right, bins=10).error, error)


def test_one_who_is_always_right_and_sure_is_calibrated():
    found = classes.measure(100 * np.eye(3), np.arange(3), NAMES[:3])
    assert found.calibration.error < 1e-12
    assert found.accuracy.value == found.macro_f1 == 1


def test_figures_are_written_and_drawn(figures, tmp_path, capsys):
    classes.show(figures, figures)
    shown = capsys.readouterr().out
    assert "taken for" in shown
    assert "dog" in shown
    classes.write(figures, tmp_path / "classes.json")
    found = json.loads((tmp_path / "classes.json").read_text())
    assert found["images"] == 60
    assert found["classes"][3]["recall"] is None
    assert [row["label"] for row in found["classes"]] == list(NAMES)
    odd = figures._replace(classes=("$x_{", "花", "a" * 50, "d"))  # matplotlib would take the first for mathematics
    for draw in (classes.plot_confusion, classes.plot_calibration):
        draw(odd, tmp_path / "a.png")
        with Image.open(tmp_path / "a.png") as image:
            assert min(image.size) > 300


class _Page(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.images, self.text, self.tags = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.images += [dict(attrs)["src"]] if tag == "img" else []

    def handle_data(self, data):
        self.text.append(data)


def test_the_surest_mistakes_stand_first_and_words_stay_words(tmp_path):
    scores = np.array([[0.0, 1.0], [0.0, 3.0], [2.0, 0.0], [5.0, 0.0]])
    names = ("<script>alert(1)</script>", "b & c")
    labels = [names[0], names[0], names[1], names[0]]  # the last one is right
    rows = classes.said(scores, names, ["0.png", "1.png", "2.png", "3.png"], labels)
    asked = []

    def picture(number):
        asked.append(number)
        return Image.new("RGB", (40, 20), (255, 0, 0))

    assert mistakes.write(rows, picture, tmp_path / "m.html") == 3
    assert asked == [1, 2, 0]
    page = _Page()
    page.feed((tmp_path / "m.html").read_text(encoding="utf-8"))
    assert "script" not in page.tags
    assert len(page.images) == 3
    assert all(one.startswith("data:image/jpeg;base64,") for one in page.images)  # needs no other file
    assert "b & c" in page.text


def test_predictions_are_written_a_line_each(tmp_path):
    rows = classes.said(np.array([[0.0, 1.0]]), ("ä", "b"), ["x.png"])
    classes.write_rows(rows, tmp_path / "p.jsonl")
    found = json.loads((tmp_path / "p.jsonl").read_text(encoding="utf-8"))
    assert found["prediction"] == "b"
    assert "label" not in found
    assert np.isclose(sum(found["top"].values()), 1)
