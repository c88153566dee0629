import numpy as np
import pytest

from jaxsft.rag import fusion, index
from jaxsft.rag.search import Searcher
from jaxsft.run import RunError

from .hashing import Hashing, build, write

WORDS = "lamp boat harbour cat keeper red green dusk dawn rope sail oil wick light storm wave".split()
DRAW = np.random.default_rng(0)
TEXTS = {f"{n:02d}.txt": " ".join(DRAW.choice(WORDS, 6)) for n in range(60)}
SAID = "lamp storm oil"


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return Searcher(build(tmp_path_factory.mktemp("search"), TEXTS), Hashing())


def sources(hits):
    return [hit.passage.source for hit in hits]


def cosines():
    question = Hashing().queries([SAID])[0]
    return {name: float(Hashing().documents([text])[0] @ question) for name, text in TEXTS.items()}


def bm25(k1: float = 1.2, b: float = 0.75) -> dict[str, float]:
    """Robertson and Zaragoza 2009, with the inverse document frequency of Lucene; no word here has another stem."""
    mean = sum(len(text.split()) for text in TEXTS.values()) / len(TEXTS)
    scores = {}
    for name, text in TEXTS.items():
        words, total = text.split(), 0.0
        for word in SAID.split():
            having = sum(word in other.split() for other in TEXTS.values())
            often = words.count(word)
            rarity = np.log(1 + (len(TEXTS) - having + 0.5) / (having + 0.5))
            total += rarity * often * (k1 + 1) / (often + k1 * (1 - b + b * len(words) / mean))
        scores[name] = float(total)
    return scores


def best(scores, k):
    return sorted(scores.values(), reverse=True)[:k]


def test_by_meaning_the_nearest_vectors_are_found(found):
    hits, known = found.find(SAID, k=8, mode="dense"), cosines()
    assert [hit.score for hit in hits] == pytest.approx(best(known, 8), abs=1e-6)
    assert [hit.similarity for hit in hits] == pytest.approx([known[name] for name in sources(hits)], abs=1e-6)


def test_by_words_the_scores_are_bm25(found):
    hits, known = found.find(SAID, k=8, mode="text"), bm25()
    assert [hit.score for hit in hits] == pytest.approx(best(known, 8), rel=1e-4)
    assert [known[name] for name in sources(hits)] == pytest.approx(best(known, 8), rel=1e-4)
    assert {hit.similarity for hit in hits} == {None}  # nobody embedded the question


def test_both_are_ranks_of_each_and_every_hit_has_its_cosine(found):
    hits, meaning, words = found.find(SAID, k=8), cosines(), bm25()
    above = lambda said, name: sum(other > said[name] + 1e-9 for other in said.values())
    equal = lambda said, name: sum(abs(other - said[name]) < 1e-9 for other in said.values())
    for hit in hits:  # texts with the same words have ranks in any order
        name = hit.passage.source
        first, ties = above(words, name) + 1, equal(words, name)
        shares = [1 / (60 + above(meaning, name) + 1) + 1 / (60 + rank) for rank in (first, first + ties - 1)]
        assert shares[1] - 3e-9 <= hit.score <= shares[0] + 3e-9
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    assert [hit.similarity for hit in hits] == pytest.approx([meaning[name] for name in sources(hits)], abs=1e-6)


def test_a_passage_that_is_found_by_words_alone_has_its_cosine(found, monkeypatch):
    from jaxsft.rag import search

    monkeypatch.setattr(search, "_by_meaning", lambda *_: {})
    hits, meaning = found.find(SAID, k=3), cosines()
    assert [hit.similarity for hit in hits] == pytest.approx([meaning[name] for name in sources(hits)], abs=1e-6)


def test_scores_can_be_fused_instead(found):
    meaning, words = cosines(), bm25()
    top = max(words.values())
    known = {name: 0.4 * words[name] / top + 0.6 * meaning[name] for name in TEXTS}
    hits = Searcher(found.store, found.embedder, fuse=fusion.scores).find(SAID, k=8)
    assert [hit.score for hit in hits] == pytest.approx(best(known, 8), rel=1e-4)


def test_a_question_that_the_embedder_cannot_read_is_searched_for_by_its_words_alone(found, monkeypatch):
    asked = []
    monkeypatch.setattr(type(found.embedder), "queries", lambda self, texts: asked.append(list(texts)) or cosine_free())
    cosine_free = lambda: np.zeros((len(asked[-1]), found.embedder.dim), np.float32)
    strange = "lamp 灯塔 在 哪里"
    [hits, _] = found.find_all([strange, SAID], k=3)
    assert asked == [[SAID]]
    assert hits == found.find(strange, k=3, mode="text")
    assert {hit.similarity for hit in hits} == {None}
    found.find(strange, k=3, mode="dense")
    assert asked[-1] == [strange]  # who asks for meaning gets it


def test_many_questions_are_answered_as_each_alone(found):
    questions = [SAID, "", "cat", "boat on a wave"]
    assert found.find_all(questions, k=4) == [found.find(question, k=4) for question in questions]


@pytest.mark.parametrize("mode", ["hybrid", "dense", "text"])
@pytest.mark.parametrize(
    "question", ["", " \n", "?!...", '"AND (OR', "lamp" * 2500, "lamp " * 2000, "\0", "lamp^2 ~+-:*"]
)
def test_any_text_may_be_asked(found, mode, question):
    hits = found.find(question, k=5, mode=mode)
    words = "lamp" in question.lower().replace("^", " ").split()
    wanted = 5 if words or (question.strip() and mode != "text") else 0
    assert len(hits) == wanted


def test_operators_of_query_languages_are_words(found):
    for question in ("lamp AND NOT storm", '"lamp storm"', "text:lamp storm", "lamp -storm"):
        assert len(sources(found.find(question, k=60, mode="text"))) == len([t for t in TEXTS.values() if _has(t)])


def _has(text):
    return "lamp" in text.split() or "storm" in text.split()


def test_k_may_be_more_than_there_are_and_not_less_than_one(found):
    assert sorted(sources(found.find(SAID, k=100))) == sorted(TEXTS)
    with pytest.raises(RunError, match="k is 0"):
        found.find(SAID, k=0)


def test_chinese_is_found_by_its_words(tmp_path):
    texts = {"猫.txt": "我的猫喜欢灯塔。", "狗.txt": "狗在港口睡觉。", "船.txt": "船长修好了红色的灯。"}
    found = Searcher(build(tmp_path, texts), Hashing())
    assert sources(found.find("哪里有灯塔？", mode="text"))[0] == "猫.txt"
    assert sources(found.find("谁在港口", mode="text"))[0] == "狗.txt"


def test_filters_hold_for_words_and_meaning(tmp_path):
    texts = {
        "a/lamp.md": "# Lamps\n\nThe lamp is red.\n\n## Oil's price\n\nThe lamp burns oil.",
        "b.csv": "text,lang,by\nThe lamp,en,Wren's\nDie Lampe,de,Wren's\nthe 100% lamp,en,x\n",
        "c.txt": "The lamp again.",
    }
    found = Searcher(build(tmp_path, texts), Hashing())
    wanted = {
        ("source=a/*",): {"a/lamp.md"},
        ("source=a/lamp.md", "heading=*price"): {"a/lamp.md"},
        ("heading=Lamps > Oil's price",): {"a/lamp.md"},
        ("kind=csv", "lang=en"): {"b.csv#1", "b.csv#3"},
        ("lang=e*",): {"b.csv#1", "b.csv#3"},
        ("lang=d*", "by=Wren's"): {"b.csv#2"},
        ("text=*100% *",): {"b.csv#3"},
        ("lang!=en", "kind!=md"): {"b.csv#2", "c.txt"},
        ("file=b.csv", "by!=x"): {"b.csv#1", "b.csv#2"},
        ("page=1",): set(),
        ("lang=en' OR 'a'='a",): set(),
        ("source=a.lamp.md",): set(),
        ("lang=.*",): set(),
        ("ang=e*",): set(),
    }
    for conditions, right in wanted.items():
        for mode in ("dense", "hybrid"):
            assert set(sources(found.find("the lamp", k=9, mode=mode, where=conditions))) == right, conditions
        assert set(sources(found.find("the lamp", k=9, mode="text", where=conditions))) <= right
    passages = [hit.passage for hit in found.find("oil", k=9, where=["heading=*price"])]
    assert [passage.heading for passage in passages] == ["Lamps > Oil's price"]


def test_a_second_opinion_puts_candidates_in_order(found):
    asked = []

    def longest(question, texts):
        asked.append((question, len(texts)))
        return [len(text) for text in texts]

    hits = Searcher(found.store, found.embedder, longest).find(SAID, k=3)
    assert asked == [(SAID, 30)]
    candidates = found.find(SAID, k=30)
    assert [hit.score for hit in hits] == sorted((len(hit.passage.text) for hit in candidates), reverse=True)[:3]


def test_diversity_leaves_out_what_was_said(tmp_path):
    texts = {"a.txt": "lamp oil lamp oil", "b.txt": "lamp oil oil lamp", "c.txt": "lamp in a storm", "d.txt": "cat"}
    found = Searcher(build(tmp_path, texts), Hashing())
    assert set(sources(found.find("lamp oil", k=2))) == {"a.txt", "b.txt"}
    assert sources(found.find("lamp oil", k=2, diversity=0.6))[1] not in ("a.txt", "b.txt")


def test_a_question_of_no_known_word_has_no_direction(tmp_path):
    class Blank(Hashing):
        def queries(self, texts):
            return np.zeros((len(texts), 32), np.float32)

    made = build(tmp_path, {"a.txt": "The lamp is red."})
    index.update(made, write(tmp_path / "docs", {"b.txt": "cat"}), Hashing())
    assert Searcher(made, Blank()).find("lamp", mode="dense") == []
    [hit] = Searcher(made, Blank()).find("lamp")
    assert (hit.passage.source, hit.similarity) == ("a.txt", 0.0)
