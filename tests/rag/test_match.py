"""Answers compared, against SQuAD's own script written out again, and by hand where it has no Chinese."""

import re
import string
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxsft.rag import match

TEXTS = st.text("aAtThe nxyz .,!'-1\n", max_size=30)


def squad(text: str) -> list[str]:
    """normalize_answer of evaluate-v1.1.py (Rajpurkar et al. 2016)."""
    text = "".join(char for char in text.lower() if char not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split()).split()


@given(TEXTS)
def test_words_are_those_of_squad(text):
    assert match.words(text) == squad(text)


@given(TEXTS, TEXTS)
def test_exact_and_f1_are_those_of_squad(answer, wanted):
    said, right = squad(answer), squad(wanted)
    both = sum((Counter(said) & Counter(right)).values())
    precision, recall = both / max(len(said), 1), both / max(len(right), 1)
    f1 = 2 * precision * recall / (precision + recall) if both else float(said == right)
    assert match.exact(answer, wanted) == float(said == right)
    assert match.f1(answer, wanted) == pytest.approx(f1)


@given(TEXTS, TEXTS)
def test_what_stands_in_an_answer_as_a_line_of_words_is_contained(answer, wanted):
    said, right = f" {' '.join(squad(answer))} ", f" {' '.join(squad(wanted))} "
    assert match.contains(answer, wanted) == float(bool(right.strip()) and right in said)


def test_chinese_counts_by_characters_and_width_does_not_matter():
    assert match.words("灯塔的主人是李山 [1]。") == list("灯塔的主人是李山")
    assert match.f1("主人是李山。", "李山") == pytest.approx(2 * (2 / 5) * 1 / (2 / 5 + 1))
    assert match.contains("红塔建于１８９３年。", "1893")


def test_citations_are_no_words():
    assert match.exact("Wren [1], [2, 3].", "wren")
    assert not match.exact("Wren [note]", "wren")
