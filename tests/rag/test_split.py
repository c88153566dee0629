"""Passages: their places, their lengths, and that nothing is lost."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxsft
from jaxsft.rag import Document, Section
from jaxsft.rag import split as splitting
from jaxsft.rag.split import LONG, joined, split
from jaxsft.run import RunError

WORDS = [
    "lamp",
    "is",
    "red.",
    "灯塔是红色的。",
    "好",
    "🙂",
    "👩‍👩‍👧",
    "é",
    "\r\n",
    "\n\n",
    "\n",
    "# ",
    "```",
    "\u2028",
    "\x1c",
    "a" * 30,
    "- ",
]


def words(text: str) -> int:
    """Characters of four bytes count thrice, blanks nothing; a text counts no more than its parts."""
    return sum((1 + len(char.encode())) // 2 for char in text if not char.isspace())


def odd(text: str) -> int:
    """A text of some lengths counts for less than its parts, as tokenizers with merges have it."""
    return max(0, len(text) - (3 if len(text) % 7 == 0 else 0))


@st.composite
def documents(draw):
    pieces = draw(st.lists(st.lists(st.sampled_from(WORDS), max_size=12).map(" ".join), min_size=1, max_size=4))
    sections, at = [], 0
    for number, piece in enumerate(pieces):
        if at < at + len(piece):
            sections.append(Section(at, at + len(piece), f"h{number}", number))
        at += len(piece)
    return Document(draw(st.sampled_from(["a.txt", "a.md"])), "a", "".join(pieces), tuple(sections))


@settings(max_examples=150, deadline=None)
@given(documents(), st.sampled_from([words, len, odd]), st.integers(8, 40), st.integers(0, 7))
def test_passages_are_where_they_say_fit_and_lose_nothing(document, length, size, overlap):
    passages = split(document, length, size=size, overlap=overlap)
    covered = set()
    for passage in passages:
        assert document.text[passage.start : passage.end] == passage.text == passage.text.strip()
        assert length(passage.text) <= size
        [section] = [s for s in document.sections if s.start <= passage.start and passage.end <= s.end]
        assert (passage.heading, passage.page) == (section.heading, section.page)
        covered |= set(range(passage.start, passage.end))
    inside = {i for section in document.sections for i in range(section.start, section.end)}
    assert {i for i in inside if not document.text[i].isspace()} <= covered
    assert [passage.start for passage in passages] == sorted(passage.start for passage in passages)


def test_passages_carry_what_is_known_of_the_document():
    document = Document("a.md", "A", "# H\n\nx", (Section(0, 6, "H", 2),), {"keeper": "Wren"})
    [passage] = split(document, len, size=99)
    assert passage == ("# H\n\nx", "a.md", "A", "H", 0, 6, 2, {"keeper": "Wren"})


def test_what_lies_in_no_section_is_in_no_passage():
    document = Document("a.md", "A", "--- tags ---x", (Section(12, 13),))
    assert [passage.text for passage in split(document, len, size=99)] == ["x"]


def test_overlap_repeats_the_end_of_the_passage_before():
    text = " ".join(f"w{i}" for i in range(100))
    passages = split(
        Document("a.txt", "", text, (Section(0, len(text)),)), lambda t: len(t.split()), size=10, overlap=3
    )
    for before, after in pairwise(passages):
        assert before.text.split()[-3:] == after.text.split()[:3]


def test_a_long_word_is_cut():
    text = "x" * 95
    found = split(Document("a.txt", "", text, (Section(0, 95),)), len, size=40)
    assert [len(passage.text) for passage in found] == [40, 40, 15]


def test_headings_without_text_go_with_the_first_section_under_them_alone():
    text = "# A\n\n## B\nx\n\n# C\n\n# D\ny"
    places = [(0, 5, "A"), (5, 13, "A > B"), (13, 18, "C"), (18, 23, "D")]
    document = Document("a.md", "A", text, tuple(Section(*place) for place in places))
    found = [(section.heading, text[section.start : section.end].split()) for section in joined(document)]
    assert found == [("A > B", ["#", "A", "##", "B", "x"]), ("C", ["#", "C"]), ("D", ["#", "D", "y"])]


@pytest.mark.parametrize(("size", "overlap"), [(0, 0), (5, 5), (5, -1)])
def test_sizes_that_cannot_be_are_refused(size, overlap):
    with pytest.raises(RunError, match=f"passages of {size} tokens with an overlap of {overlap}"):
        split(Document("a.txt", "", "x", (Section(0, 1),)), len, size=size, overlap=overlap)


def test_a_tokenizer_is_asked_about_few_characters_however_long_the_text():
    from tokenizers import Tokenizer

    tokenizer, asked = Tokenizer.from_file(f"{jaxsft.BASE}/tokenizer.json"), []

    def length(text: str) -> int:
        asked.append(len(text))
        return len(tokenizer.encode(text, add_special_tokens=False).ids)

    text = "The keeper of the red lamp is Wren. 灯塔是红色的。\n\n" * 100 + "A" * (10 * LONG)
    passages = split(Document("a.txt", "", text, (Section(0, len(text)),)), length, size=64, overlap=8)
    assert max(length(passage.text) for passage in passages) <= 64
    assert sum(asked) < 40 * len(text)  # without cutting the long word first: 150 times


@pytest.mark.parametrize("end", ["\n\n", "\n", " ", ""])
def test_a_long_section_is_cut_into_pieces_at_what_parts_it_best(monkeypatch, end):
    monkeypatch.setattr(splitting, "PIECE", 200)
    text = "".join(f"{number:04d} lamps are red.{end}" for number in range(60))
    found = split(Document("a.txt", "a", text, (Section(0, len(text)),)), lambda text: len(text.split()), size=50)
    assert all(text[one.start : one.end] == one.text for one in found)
    assert "".join("".join(one.text.split()) for one in found) == "".join(text.split())
    assert max(one.end - one.start for one in found) <= 200
    if end:
        assert all(one.text.endswith("red.") or end == " " for one in found)
