"""Rows that teach reading: their passages, their numbers, and that the prompt is the one that is asked."""

import pytest

from jaxsft.data.rows import DataError
from jaxsft.rag import Hit, Passage, answer, rows
from jaxsft.rag.rows import Mined, Question

TOWN = {f"{name}.md": f"The keeper of the {name} is {who}." for name, who in zip("abcdefgh", "STUVWXYZ", strict=True)}
ASKED = [Question(f"Who keeps the {source[0]}?", (text,), source) for source, text in TOWN.items()]


def hit(source: str, text: str, start: int = 0) -> Hit:
    return Hit(Passage(text, source, start=start, end=start + len(text)), 1.0)


HITS = [hit(source, text) for source, text in TOWN.items()]
MINED = [Mined(q, h, tuple(other for other in HITS if other != h)) for q, h in zip(ASKED, HITS, strict=True)] * 40


def test_a_row_is_the_prompt_that_is_asked_and_names_the_passage_that_answers():
    for one, row in zip(MINED, rows.build(MINED, unknown=0.0), strict=True):
        asked, said = (turn["content"] for turn in row["messages"])
        [number] = answer.cited(said)
        assert said == f"{one.gold.passage.text[:-1]} [{number}]."
        blocks = asked.split("\n\n")
        assert blocks[number - 1] == f"[{number}] {one.gold.passage.source}\n> {one.gold.passage.text}"
        assert blocks[-2:] == [answer.RULES, f"Question: {one.question.question}"]
        shown = [next(h for h in HITS if f"({h.passage.source})" in b or h.passage.source in b) for b in blocks[:-2]]
        assert asked == answer.messages(one.question.question, shown)[-1].content


def test_rows_have_one_to_so_many_passages_and_the_right_one_anywhere():
    numbers, counts = set(), set()
    for row in rows.build(MINED, passages=4, unknown=0.0):
        asked, said = (turn["content"] for turn in row["messages"])
        counts.add(asked.count("\n> "))
        numbers |= set(answer.cited(said))
    assert counts == numbers == {1, 2, 3, 4}


def test_a_share_lacks_the_right_passage_and_says_so():
    without = 0
    for one, row in zip(MINED, rows.build(MINED, unknown=0.25, seed=3), strict=True):
        asked, said = (turn["content"] for turn in row["messages"])
        assert (said == answer.UNKNOWN) == (one.gold.passage.text not in asked)
        without += said == answer.UNKNOWN
    assert pytest.approx(without, abs=4 * (320 * 0.25 * 0.75) ** 0.5) == 0.25 * 320  # four standard deviations


def test_rows_are_a_function_of_the_seed():
    assert list(rows.build(MINED, seed=1)) == list(rows.build(MINED, seed=1)) != list(rows.build(MINED, seed=2))


def test_the_right_passage_of_a_document_is_the_one_that_holds_the_answer():
    long = [hit("a.md", "The keeper of the a.", 0), hit("a.md", "It is S. The keeper of the a is S.", 30)]
    find = lambda questions, k: [[*long, *HITS[1:]] for _ in questions]
    [found] = rows.mine([ASKED[0]], find)
    assert found.gold == long[1]
    assert found.others == (long[0], *HITS[1:])


def test_passages_that_tell_the_same_are_no_distractors():
    same = hit("z.md", f"They say: the keeper of the a is S, {'x' * 9}")
    overlapping = hit("a.md", TOWN["a.md"][5:], 5)
    find = lambda questions, k: [[same, HITS[0], overlapping, HITS[1]] for _ in questions]
    [found] = rows.mine([ASKED[0]], find)
    assert (found.gold, found.others) == (HITS[0], (HITS[1],))


def test_a_source_that_the_search_misses_is_asked_for_by_name_and_else_left_out():
    wanted = []

    def find(questions, k, where=()):
        wanted.extend(where)
        return [[HITS[2]] if where == ["source=t.csv#*"] else [HITS[1]] if not where else [] for _ in questions]

    assert list(rows.mine([ASKED[0]._replace(source="none.md")], lambda questions, **_: [[] for _ in questions])) == []
    [found] = rows.mine([ASKED[0]._replace(source="t.csv")], find)
    assert found.gold == HITS[2]
    assert wanted == ["source=t.csv", "source=t.csv#*"]


def test_questions_may_have_several_answers(tmp_path):
    file = tmp_path / "q.jsonl"
    file.write_text('{"question": "Who?", "answer": ["Wren.", "Captain Wren."], "source": "a.md"}\n', encoding="utf-8")
    assert rows.read(str(file)) == [Question("Who?", ("Wren.", "Captain Wren."), "a.md")]


@pytest.mark.parametrize("row", ['{"question": "Who?"}', '{"answer": "x"}', '{"question": "q", "answer": [" "]}'])
def test_a_row_without_question_or_answer_is_told_by_its_place(tmp_path, row):
    file = tmp_path / "q.jsonl"
    file.write_text(row, encoding="utf-8")
    with pytest.raises(DataError, match=r"q\.jsonl line 1: has no question and answer in words"):
        rows.read(str(file))
