import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import jaxsft
from jaxsft import hub
from jaxsft.sample import stops

ENDS = stops.ENDS


def walk(table, row):
    """The place of the token in which a string ends, and None where none does."""
    state = 0
    for place, token in enumerate(row):
        state = int(table[state, token])
        if state == ENDS:
            return place
    return None


def searched(row, pieces, words):
    """The same by a plain search in the text so far."""
    for place in range(len(row)):
        text = b"".join(pieces[token] for token in row[: place + 1])
        if any(word in text for word in words):
            return place
    return None


short = st.text("abé", min_size=1, max_size=4).map(str.encode)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(short, min_size=1, max_size=4),
    st.lists(st.text("abé", max_size=3).map(str.encode), min_size=1, max_size=6),
    st.lists(st.integers(0, 100), max_size=12),
)
def test_strings_are_found_where_a_search_in_the_text_finds_them(words, pieces, numbers):
    row = [number % len(pieces) for number in numbers]
    table = stops.over_tokens(stops.automaton(words), pieces)
    assert walk(table, row) == searched(row, pieces, words)


def test_a_word_inside_of_another_ends_first_and_a_failed_one_may_be_anothers_beginning():
    for words, text in (([b"abcd", b"bc"], b"xabcd"), ([b"aab"], b"aaab"), ([b"abab", b"ba"], b"aba")):
        pieces = [bytes([byte]) for byte in range(256)]
        table = stops.over_tokens(stops.automaton(words), pieces)
        assert walk(table, text) == searched(list(text), pieces, words)


def by_words() -> PreTrainedTokenizerFast:
    """A vocabulary as sentencepiece writes it: marked words, bytes, special and added tokens."""
    names = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁the", "▁", "th", "e", "▁e", "é", "nd"]
    core = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, [], unk_token="<unk>", byte_fallback=True))
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    core.decoder = decoders.Sequence(parts)
    core.add_special_tokens([AddedToken("</s>", special=True), AddedToken("<|sep|>", special=True)])
    core.add_tokens([AddedToken("<think>")])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="<unk>")


def by_pieces() -> PreTrainedTokenizerFast:
    """A vocabulary of another kind, whose decoder says how its pieces join."""
    core = Tokenizer(models.WordPiece({name: i for i, name in enumerate(["[UNK]", "a", "##b", "c", "##d"])}))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]")


TOKENIZERS = {"bytes": lambda: hub.load_tokenizer(jaxsft.BASE), "words": by_words, "pieces": by_pieces}


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]()


def test_the_pieces_of_tokens_join_to_the_text_that_the_tokenizer_makes_of_them(tokenizer):
    pieces, draw = stops.pieces(tokenizer), np.random.default_rng(0)
    assert len(pieces) == len(tokenizer)
    whole = [[token] for token, piece in enumerate(pieces) if "\ufffd" not in piece.decode(errors="replace")]
    spelt = [tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in "猫".encode()]
    units = [*whole, *[spelt] * 20] if b"\x9a" in pieces and None not in spelt else whole
    first = next(token for token, piece in enumerate(pieces) if piece in (b" the", b" a"))
    for _ in range(100):
        row = [first, *(token for i in draw.integers(0, len(units), 12) for token in units[i])]
        joined = b"".join(pieces[token] for token in row).decode()
        assert tokenizer.decode(row, skip_special_tokens=False).lstrip(" ") == joined.lstrip(" "), row


def test_a_string_is_found_across_tokens_inside_of_them_and_in_special_ones():
    tokenizer = by_words()
    ids = lambda *names: [tokenizer.convert_tokens_to_ids(name) for name in names]
    table = lambda *strings: stops.compile(strings, tokenizer).table
    assert walk(table("he e"), ids("▁the", "▁e", "nd")) == 1
    assert walk(table("t"), ids("▁", "nd", "th")) == 2
    assert walk(table("é"), ids("▁", "<0xC3>", "<0xA9>", "é")) == 2
    assert walk(table("d<|sep|>"), ids("e", "nd", "<|sep|>")) == 2
    assert walk(table("<think>"), ids("e", "<think>")) == 1
    assert walk(table("end", "xyz"), ids("▁the", "▁nd")) is None


def test_real_text_stops_at_the_token_that_completes_the_string():
    tokenizer = hub.load_tokenizer(jaxsft.BASE)
    ids = tokenizer("To be, or not to be, that is the 猫 question", add_special_tokens=False)["input_ids"]
    for string in ("not to", " be, t", "猫", "question"):
        at = walk(stops.compile([string], tokenizer).table, ids)
        assert string in tokenizer.decode(ids[: at + 1])
        assert string not in tokenizer.decode(ids[:at])


def test_no_strings_are_no_automaton_and_an_empty_one_is_refused():
    assert stops.compile([], by_words()) is None
    with pytest.raises(ValueError, match=r"stop strings are \['a', ''\]; an empty one would end every answer"):
        stops.compile(["a", ""], by_words())


def test_the_text_ends_before_the_first_of_the_strings():
    assert stops.until("one two three", ["three", "two"]) == "one "
    assert stops.until("one", ["two"]) == stops.until("one", []) == "one"


def test_a_saved_tokenizer_is_read_alike(tmp_path):
    by_words().save_pretrained(tmp_path)
    again = hub.load_tokenizer(str(tmp_path))
    assert json.loads((tmp_path / "tokenizer.json").read_text())["decoder"]["type"] == "Sequence"
    assert stops.pieces(again) == stops.pieces(by_words())
