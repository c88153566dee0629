"""Answers from what a search finds, or that nothing is known."""

import jax
import pytest

import jaxsft
from jaxsft import hub, sample, talk, voice
from jaxsft.data import Message, prompt_ids
from jaxsft.rag import answer
from jaxsft.rag.records import Hit, Passage

NEAR = Hit(Passage("The lamp is lit at dusk.", "lamps.md"), 1.0, similarity=0.8)
FAR = NEAR._replace(similarity=0.1)
TALK = (Message("user", "When is the lamp lit?"), Message("assistant", "At dusk [1]."))
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def speaker():
    model, params = hub.load(jaxsft.BASE)
    return talk.Speaker(model, voice.load(jaxsft.BASE, model, {"params": params}), sample.Config(max_new_tokens=4))


@pytest.fixture
def words(monkeypatch):
    """words("...") makes the model say that, and gives the prompts that it was asked with."""

    def make(said: str) -> list[str]:
        asked = []

        def stream(model, variables, prompt, **_):
            asked.append(hub.load_tokenizer(jaxsft.BASE).decode(prompt))
            return iter(hub.load_tokenizer(jaxsft.BASE)(said, add_special_tokens=False)["input_ids"])

        monkeypatch.setattr(sample, "stream", stream)
        return asked

    return make


def test_the_model_reads_the_passages_and_its_numbers_are_told(speaker, words, capsys):
    asked = words("At dusk [1].")
    said = talk.reply("When is it lit?", lambda query: [NEAR], speaker, talk.Config(), KEY)
    assert said == "At dusk [1]."
    assert capsys.readouterr().out == "At dusk [1].\n  [1] lamps.md\n"
    assert [
        speaker.who.tokenizer.decode(prompt_ids(answer.messages("When is it lit?", [NEAR]), speaker.who.tokenizer))
    ] == asked


def test_where_nothing_is_near_the_model_is_not_asked(speaker, words, capsys):
    asked = words("At dusk [1].")
    said = talk.reply("Who won?", lambda query: [FAR], speaker, talk.Config(threshold=0.3), KEY)
    assert said == answer.UNKNOWN
    assert capsys.readouterr().out == "I do not know. (nearest: similarity 0.10 in lamps.md; 0.30 is needed)\n"
    talk.reply("Who won?", lambda query: [], speaker, talk.Config(), KEY)
    assert capsys.readouterr().out == "I do not know. (nothing found)\n"
    assert not asked


@pytest.mark.parametrize(
    ("how", "said", "query"),
    [
        ("rewrite", " Who trims the lamp?\nAnd more", "Who trims the lamp?"),
        ("rewrite", "  ", "When is the lamp lit? And who trims it?"),
        ("join", "unused", "When is the lamp lit? And who trims it?"),
        ("off", "unused", "And who trims it?"),
    ],
)
def test_a_follow_up_is_searched_for_in_words_that_stand_alone(speaker, words, capsys, how, said, query):
    asked, queries = words(said), []
    find = lambda query: queries.append(query) or [FAR]
    talk.reply("And who trims it?", find, speaker, talk.Config(followups=how), KEY, history=TALK)
    assert queries == [query]
    assert ("searching: " in capsys.readouterr().out) == (how != "off")
    assert len(asked) == (how == "rewrite")
    assert all("Last question: And who trims it?" in prompt and "At dusk [1]." in prompt for prompt in asked)


def test_a_first_question_is_searched_for_as_it_is(speaker, words):
    queries = []
    words("Yes.")
    talk.reply("Lit?", lambda query: queries.append(query) or [FAR], speaker, talk.Config(), KEY)
    system = (Message("system", "Be brief."),)
    talk.reply("Lit?", lambda query: queries.append(query) or [FAR], speaker, talk.Config(), KEY, history=system)
    assert queries == ["Lit?", "Lit?"]


def test_a_long_talk_and_long_passages_leave_room_for_the_answer(speaker, monkeypatch):
    lengths = []
    monkeypatch.setattr(sample, "stream", lambda model, variables, prompt, **_: iter(lengths.append(len(prompt)) or []))
    hits = [NEAR._replace(passage=NEAR.passage._replace(text="Wick trims the lamp. " * 40))] * 9
    talk.reply("And now?", lambda query: hits, speaker, talk.Config(), KEY, history=TALK * 60)
    rewriting, answering = lengths
    assert rewriting <= speaker.model.config.max_position - talk.LONGEST_QUERY
    assert speaker.room - 200 < answering <= speaker.room == speaker.model.config.max_position - 4
