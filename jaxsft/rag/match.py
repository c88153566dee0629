"""Whether an answer is the wanted one: exactly, by its words, or somewhere in it.

Answers are compared as SQuAD compares them (Rajpurkar et al. 2016, arXiv:1606.05250): small letters, no punctuation, no
articles. Chinese has no spaces, so each of its characters is a word. Citations like [1] are taken out before.
"""

import re
import unicodedata
from collections import Counter

CITATION = re.compile(r"\[\d+(?:\s*[,;，、]\s*\d+)*\]")
ARTICLES = {"a", "an", "the"}
CHINESE = r"\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
WORD = re.compile(rf"[{CHINESE}]|[^\s{CHINESE}]+")


def words(text: str) -> list[str]:
    """The words of an answer that count.

    Example:
      >>> words("The keeper's name is Wren [2].")
      ['keepers', 'name', 'is', 'wren']
      >>> words("守护人是Wren。")
      ['守', '护', '人', '是', 'wren']
    """
    text = CITATION.sub(" ", unicodedata.normalize("NFKC", text)).lower()
    kept = "".join(char for char in text if unicodedata.category(char)[0] not in "PS")
    return [word for word in WORD.findall(kept) if word not in ARTICLES]


def exact(answer: str, wanted: str) -> float:
    """1 if both have the same words in the same order.

    Example:
      >>> exact("Wren [1].", "wren"), exact("Captain Wren", "Wren")
      (1.0, 0.0)
    """
    return float(words(answer) == words(wanted))


def f1(answer: str, wanted: str) -> float:
    """The harmonic mean of the share of the answer's words that are wanted, and of the wanted words that are in it.

    Example:
      >>> f1("Captain Wren", "Wren"), f1("", ""), f1("Wren", "")
      (0.6666666666666666, 1.0, 0.0)
    """
    said, right = Counter(words(answer)), Counter(words(wanted))
    if not said or not right:
        return float(said == right)
    both = (said & right).total()
    return 2 * both / (said.total() + right.total())


def contains(answer: str, wanted: str) -> float:
    """1 if the wanted words stand in the answer, one behind the other.

    Example:
      >>> contains("It is Wren who keeps it.", "Wren"), contains("Wrens", "Wren"), contains("x", "")
      (1.0, 0.0, 0.0)
    """
    said, right = words(answer), words(wanted)
    starts = range(len(said) - len(right) + 1)
    return float(bool(right) and any(said[at : at + len(right)] == right for at in starts))
