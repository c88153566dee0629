"""What passes from a file to an answer: a document, its passages, and what a search found.

    file -> Document (readers) -> Passage (split) -> a row of the store (index) -> Hit (search) -> a numbered quotation

A document's text is one string, in which everything else counts characters.
"""

from collections.abc import Mapping
from typing import NamedTuple


class Section(NamedTuple):
    """A stretch of a document's text under one heading and on one page."""

    start: int  # its first character in the document's text
    end: int  # the one behind its last
    heading: str = ""  # the way to it, outermost first: Manual > Lamps
    page: int | None = None  # counted from 1, where the format has pages


class Document(NamedTuple):
    """A text as it was read."""

    source: str  # the file from the folder on, with /; of a row in a table: notes.csv#3, rows counted from 1
    title: str
    text: str
    sections: tuple[Section, ...]  # in order, apart from each other; what lies in none is not indexed
    tags: Mapping[str, str] = {}  # what a search can filter by: front matter, columns of a row


class Passage(NamedTuple):
    """A piece of a document, small enough for the embedder: document.text[start:end]."""

    text: str
    source: str
    title: str = ""
    heading: str = ""
    start: int = 0
    end: int = 0
    page: int | None = None
    tags: Mapping[str, str] = {}


class Hit(NamedTuple):
    """A passage that a search found."""

    passage: Passage
    score: float  # what the hits are ordered by: higher is better, comparable only within one search
    similarity: float | None = None  # cosine of question and passage, in any search that embedded the question
