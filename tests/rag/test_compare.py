"""Figures of a comparison against plain loops, and what is recommended for towns whose figures are known."""

import json
import re

import numpy as np
import pytest

from jaxsft.rag import Hit, Passage, compare, page, verdict
from jaxsft.rag.compare import ARMS, BASE, BOTH, RAG, TUNED, Reply, Round
from jaxsft.rag.rows import Question

N = 40
OLD = [Question(f"q{i}", (f"a{i}",), f"{i}.md") for i in range(N)]
NEW = [q if i % 2 else q._replace(answers=(f"b{i}",)) for i, q in enumerate(OLD)]
RIGHT = {BASE: 0.0, RAG: 0.9, TUNED: 0.9, BOTH: 0.9}


def replies(questions, share, retrieves, known=None):
    """The first answers are right, or what was right once; the others are wrong."""
    found = []
    for i in range(len(questions)):
        text = (known or questions)[i].answers[0] if i < share * len(questions) else "no idea"
        hits = (Hit(Passage("", f"{i}.md"), 1.0), Hit(Passage("", "other.md"), 0.5)) if retrieves else ()
        found.append(Reply(f"{text} [1]." if retrieves else text, hits))
    return found


def rounds(before, after=None, stale=(TUNED,)):
    """A round before and one after the change, in which the stale ways say what was right before."""
    made = [Round("then", OLD, {arm: replies(OLD, share, arm in (RAG, BOTH)) for arm, share in before.items()})]
    if after:
        known = lambda arm: OLD if arm in stale else None
        later = {arm: replies(NEW, share, arm in (RAG, BOTH), known(arm)) for arm, share in after.items()}
        made.append(Round("now", NEW, later))
    return made


def test_scores_are_the_best_over_all_right_answers():
    asked = Question("Who?", ("Captain Silas Wren", "Wren"))
    for text, exact, f1, contains in [("wren.", 1, 1, 1), ("It is Wren", 0, 0.5, 1), ("Silas", 0, 0.5, 0)]:
        found = [compare.score(asked, Reply(text), name) for name in ("exact", "F1", "contains")]
        assert found == [exact, f1, contains]


@pytest.mark.parametrize(
    ("text", "source", "right"),
    [("x [1].", "a.md", 1), ("x [2].", "t.csv", 1), ("x [1][2].", "a.md", 0), ("x [3].", "a.md", 0), ("x", "a.md", 0)],
)
def test_a_citation_is_right_if_all_of_it_is_from_the_source(text, source, right):
    hits = (Hit(Passage("", "a.md"), 1.0), Hit(Passage("", "t.csv#4"), 1.0))
    assert compare.score(Question("?", ("x",), source), Reply(text, hits), "cited") == right


def test_a_citation_counts_only_where_there_is_something_to_cite():
    hits = (Hit(Passage("", "a.md"), 1.0),)
    assert np.isnan(compare.score(Question("?", ("x",)), Reply("x [1]", hits), "cited"))
    assert np.isnan(compare.score(Question("?", ("x",), "a.md"), Reply("x [1]"), "cited"))


def test_a_difference_is_taken_question_by_question():
    draw = np.random.default_rng(0)
    hard = draw.random(200)
    one, other = (hard > 0.5).astype(float), (hard > 0.55).astype(float)
    paired = compare.difference(one, other)
    assert paired.mean == pytest.approx(sum(a - b for a, b in zip(one, other, strict=True)) / 200)
    gap = one - other
    normal = 1.96 * gap.std() / len(gap) ** 0.5  # the closed form that the bootstrap comes near to
    assert (paired.low, paired.high) == pytest.approx((gap.mean() - normal, gap.mean() + normal), abs=0.01)
    assert paired.sure
    apart = 1.96 * (one.var() / 200 + other.var() / 200) ** 0.5
    assert apart > 2 * normal  # side by side nothing could have been told


def test_figures_leave_out_what_says_nothing():
    assert compare.figure(np.array([np.nan, 1.0, 0.0, np.nan])).mean == 0.5
    assert compare.figure(np.array([])) is None


def test_found_is_the_share_of_questions_whose_source_was_shown():
    asked = rounds({RAG: 1.0})[0]
    lost = [reply if i % 4 else reply._replace(hits=reply.hits[1:]) for i, reply in enumerate(asked.replies[RAG])]
    assert compare.found(asked).mean == 1.0
    assert compare.found(asked._replace(replies={RAG: lost})).mean == 0.75
    assert compare.found(rounds({BASE: 1.0})[0]) is None


@pytest.mark.parametrize(
    ("before", "after", "stale", "advice"),
    [
        (RIGHT, None, (), verdict.PLAIN),
        (RIGHT, RIGHT, (TUNED,), verdict.READ),
        (RIGHT | {RAG: 0.0}, RIGHT | {RAG: 0.0}, (TUNED,), verdict.BOTH_ADD),
        (RIGHT | {RAG: 0.0, BOTH: 0.1}, None, (), verdict.TUNE),
        (RIGHT | {RAG: 0.0, BOTH: 0.9}, RIGHT | {RAG: 0.0}, (TUNED, BOTH), verdict.AGAIN),
        (dict.fromkeys(ARMS, 0.0), None, (), verdict.NEITHER),
        ({BASE: 0.0, RAG: 0.9}, None, (), verdict.PLAIN),
        ({BASE: 0.0, TUNED: 0.9}, None, (), verdict.TUNE),
    ],
    ids=["all", "stale", "tuned reads", "no passages", "all stale", "nothing", "base alone", "tuned alone"],
)
def test_what_is_recommended_follows_from_the_figures(before, after, stale, advice):
    assert verdict.recommend(verdict.findings(*rounds(before, after, stale))) == advice


def test_a_search_that_misses_is_to_be_mended_first():
    asked = rounds(dict.fromkeys((BASE, RAG), 0.0))[0]
    blind = [reply._replace(hits=reply.hits[1:]) for reply in asked.replies[RAG]]
    asked = asked._replace(replies=asked.replies | {RAG: blind})
    assert verdict.recommend(verdict.findings(asked)) == verdict.MEND


def test_findings_bring_their_figures():
    seen = {one.key: one for one in verdict.findings(*rounds(RIGHT, RIGHT))}
    assert seen["passages"].evidence.startswith("base + passages less base, exact, then: +0.90 [+0.8")
    fall = seen["tuned falls"]
    assert fall.holds
    assert fall.evidence.startswith("20 changed answers, exact, after less before: -0.90 [-1.00, ")
    assert not seen["base + passages falls"].holds


def test_a_report_needs_no_other_file_and_shows_text_as_it_is(tmp_path):
    made = rounds(RIGHT, RIGHT)
    page.plot(made, tmp_path / "a.png")
    tables = [page.figures(made[0], {BASE: 0.0125}), page.by_fate(*made), page.Table("t", ("a",), [("<b>&",)])]
    html = page.page("Do.", verdict.findings(*made), tables, tmp_path / "a.png", {"base": "<x>"}, page.notes())
    assert not re.findall(r'(?:src|href)="(?!data:)', html)
    assert "<b>&" not in html
    assert "&lt;b&gt;&amp;" in html
    assert "12 ms" in html or "13 ms" in html
    assert "as before (20)" in html
    assert "changed (20)" in html
    assert (tmp_path / "a.png").stat().st_size > 5000


def test_what_training_took_is_read_from_its_metrics(tmp_path):
    lines = [{"step": 0, "eval_loss": 3.0}]
    lines += [{"step": s, "loss": 1.0, "trained_tokens": 100 * s, "tokens_per_second": 10.0 * s} for s in (1, 2, 3)]
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    assert compare.cost(file) == (3, 600, 20.0)
    assert compare.cost(tmp_path / "none.jsonl") is None
