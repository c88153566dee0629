import jax
import pytest

import jaxsft
from jaxsft import hub, sample
from jaxsft.sample import Draw, answers, stops

from .conftest import MODEL, NEW, PROMPTS


@pytest.mark.parametrize("draw", [Draw(), Draw(0.8, 12, 0.9, 0.01, 1.3)], ids=["greedy", "drawn"])
def test_a_stream_yields_the_tokens_of_generate(variables, draw):
    how = {"max_new_tokens": NEW, "draw": draw, "key": jax.random.key(5)}
    [whole] = answers(sample.generate(MODEL, variables, [PROMPTS[1]], **how))
    assert list(sample.stream(MODEL, variables, PROMPTS[1], **how)) == whole


def test_a_stream_ends_before_a_stop_token_and_behind_the_token_that_completes_a_string(variables, greedy):
    row = greedy[1]
    at = next(i for i, token in enumerate(row) if i and token not in row[:i])
    assert list(sample.stream(MODEL, variables, PROMPTS[1], max_new_tokens=NEW, stop=[row[at]])) == row[:at]
    pieces = [bytes([97 + token]) for token in range(23)]
    strings = stops.Strings(("?",), stops.over_tokens(stops.automaton([pieces[row[at]]]), pieces))
    assert list(sample.stream(MODEL, variables, PROMPTS[1], max_new_tokens=NEW, strings=strings)) == row[: at + 1]


def test_pieces_of_a_stream_join_to_the_text_and_never_cut_a_character():
    tokenizer = hub.load_tokenizer(jaxsft.BASE)
    text = "A猫🐈 says 你好."
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    parts = list(sample.pieces(tokenizer, iter(ids)))
    assert "".join(parts) == text
    assert len(parts) > 3
    assert all("\ufffd" not in part for part in parts)


@pytest.mark.parametrize("string", ["你好", " says", "🐈", "nowhere", "."])
def test_pieces_end_before_a_string_and_hold_back_what_may_be_its_beginning(string):
    tokenizer = hub.load_tokenizer(jaxsft.BASE)
    text = "A猫🐈 says 你好. says"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    shown = ""
    for part in sample.pieces(tokenizer, iter(ids), [string]):
        shown += part
        assert text.startswith(shown)
        assert string not in shown
    assert shown == text.split(string)[0]
