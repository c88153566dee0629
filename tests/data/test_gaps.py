"""Texts for encoders: their pieces, their gaps, and where words begin."""

import json

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from jaxsft import data
from jaxsft.data import Config, DataError, Example, in_memory, masking
from jaxsft.data.pack import passages

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = [*SPECIAL, "the", "lamp", "##s", "was", "lit", "##ter", "[", "]", "sep", "."]
NAMED = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}


def word_piece(**options) -> PreTrainedTokenizerFast:
    """A BERT's tokenizer of fifteen tokens."""
    core = Tokenizer(models.WordPiece({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer(lowercase=True)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece()
    core.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    core.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(tokenizer_object=core, **{**NAMED, **options})


@pytest.fixture(scope="module")
def bert() -> PreTrainedTokenizerFast:
    return word_piece()


def load(path, tokenizer, rows, **options):
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return data.load(Config(train=str(path), **{"max_length": 16, **options}), tokenizer, "masked")


def words(ids):
    return " ".join(WORDS[i] for i in ids)


def test_a_text_stands_between_cls_and_sep_and_neither_may_be_masked(bert, tmp_path):
    rows, _, report = load(tmp_path / "t.jsonl", bert, [{"text": "The lamps was litter."}])
    document = rows.document(0)
    assert words(document.ids) == "[CLS] the lamp ##s was lit ##ter . [SEP]"
    assert document.mask.astype(int).tolist() == [0, 1, 1, 1, 1, 1, 1, 1, 0]
    assert document.ids.tolist() == bert("The lamps was litter.")["input_ids"]  # as the tokenizer has it
    assert (report.documents, report.tokens, report.trained_tokens) == (1, 9, 7)


def test_special_tokens_that_a_text_spells_are_text(bert, tmp_path):
    rows, _, _ = load(tmp_path / "t.jsonl", bert, [{"text": "the [SEP] lamp"}])
    assert words(rows.document(0).ids) == "[CLS] the [ sep ] lamp [SEP]"
    rows, _, _ = load(tmp_path / "t.jsonl", bert, [{"text": "the [SEP] lamp"}], control_tokens=True)
    assert words(rows.document(0).ids) == "[CLS] the [SEP] lamp [SEP]"


@pytest.mark.parametrize(("length", "most"), [(1, 3), (3, 3), (9, 5), (10, 12), (11, 12), (23, 12), (200, 7)])
def test_a_long_text_becomes_pieces_of_one_size_that_lose_nothing(length, most):
    text = Example(np.array([2, *range(5, 5 + length), 3]), np.array([0, *[1] * length, 1]) > 0)
    pieces = passages(text, most)
    assert all(piece.ids[0] == 2 and piece.ids[-1] == 3 and len(piece.ids) <= most for piece in pieces)
    assert all(not piece.mask[[0, -1]].any() and piece.mask[1:-1].all() for piece in pieces)
    assert [i for piece in pieces for i in piece.ids[1:-1].tolist()] == list(range(5, 5 + length))
    sizes = [len(piece.ids) for piece in pieces]
    assert max(sizes) - min(sizes) <= 1
    assert len(pieces) == -(-length // (most - 2))


def test_a_long_text_of_a_file_is_cut_into_passages(bert, tmp_path):
    rows, _, report = load(tmp_path / "t.jsonl", bert, [{"text": "the lamp " * 10}], max_length=12)
    assert (report.documents, report.truncated) == (2, 0)
    for i in range(2):
        assert words(rows.document(i).ids) == "[CLS] " + "the lamp " * 5 + "[SEP]"


def test_a_tokenizer_without_cls_and_sep_uses_bos_and_eos_or_is_refused(make, bert, tmp_path):
    tokenizer = make(bos_token="<s>", eos_token="<|im_end|>")
    rows, _, _ = load(tmp_path / "t.jsonl", tokenizer, [{"text": "hello world"}])
    ids = rows.document(0).ids.tolist()
    assert ids == [tokenizer.bos_token_id, *tokenizer("hello world")["input_ids"], tokenizer.eos_token_id]
    with pytest.raises(
        DataError, match="begins with cls_token and ends with sep_token, and the tokenizer does not name"
    ):
        load(tmp_path / "t.jsonl", word_piece(sep_token=None), [{"text": "the lamp"}])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": ""}, "the text is empty; remove the row"),
        ({"text": "  \n"}, "the text is empty; remove the row"),
        ({"instruction": "a", "output": "b"}, r"the row holds a conversation \(alpaca\); this run takes texts"),
    ],
)
def test_rows_that_are_no_text_are_refused_by_place(bert, tmp_path, row, message):
    with pytest.raises(DataError, match=f"t.jsonl line 2: {message}"):
        load(tmp_path / "t.jsonl", bert, [{"text": "the lamp"}, row])


def test_a_row_must_have_room_for_one_token_between_two(bert, tmp_path):
    with pytest.raises(DataError, match="data.max_length is 2; it must be at least 3, two that enclose one"):
        load(tmp_path / "t.jsonl", bert, [{"text": "the lamp"}], max_length=2)


# ---- what a tokenizer says ------------------------------------------------------------------------------------------


def test_ordinary_tokens_are_those_that_are_not_special(bert):
    found = masking(bert)
    assert (found.mask_id, found.continues) == (4, None)
    assert words(found.ordinary) == " ".join(WORDS[5:])


def test_word_pieces_go_on_with_a_word(bert):
    continues = masking(bert, whole_words=True).continues
    assert continues.tolist() == [word.startswith("##") for word in WORDS]


def test_byte_level_tokens_without_a_blank_go_on_with_a_word(make):
    tokenizer = make(eos_token="<|im_end|>", mask_token="<s>")
    continues = masking(tokenizer, whole_words=True).continues
    ids = tokenizer("hello world good\nnight unheard")["input_ids"]
    pieces = [tokenizer.decode([i]) for i in ids]
    begun = [piece.startswith((" ", "\n")) for piece in pieces]
    assert [bool(continues[i]) for i in ids] == [not begins for begins in begun]
    assert sum(begun) == 4  # three words behind a blank and one behind a line's end


def test_sentencepiece_tokens_without_a_blank_go_on_with_a_word():
    vocabulary = [("<mask>", 0.0), ("<unk>", 0.0), ("▁the", -1.0), ("▁lamp", -1.0), ("s", -2.0), ("▁", -3.0)]
    core = Tokenizer(models.Unigram(vocabulary, 1))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, mask_token="<mask>", unk_token="<unk>")
    continues = masking(tokenizer, whole_words=True).continues
    assert [bool(continues[i]) for i in tokenizer("the lamps")["input_ids"]] == [False, False, True]


def test_words_that_are_tokens_all_begin_and_letters_that_are_tokens_do_not_tell():
    core = Tokenizer(models.WordLevel({"<mask>": 0, "lamp": 1, "?": 2}, "?"))
    found = masking(PreTrainedTokenizerFast(tokenizer_object=core, mask_token="<mask>"), whole_words=True)
    assert found.continues.tolist() == [False] * 3
    letters = Tokenizer(models.BPE({"<mask>": 0, "l": 1, "a": 2}, []))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, mask_token="<mask>")
    assert masking(tokenizer).ordinary.tolist() == [1, 2]
    with pytest.raises(
        DataError, match="this BPE tokenizer do not tell where words begin .* set train.whole_words to fal"
    ):
        masking(tokenizer, whole_words=True)


def test_a_tokenizer_without_a_mask_is_refused(chatml):
    with pytest.raises(DataError, match="has no mask_token, and masked-token training needs one; choose an encoder"):
        masking(chatml)


# ---- gaps for people ------------------------------------------------------------------------------------------------


def test_blanks_are_texts_with_every_seventh_token_hidden(bert):
    text = [2, *[5, 6, 7, 8, 9, 10] * 5, 3]
    rows = in_memory([Example(np.array(text), np.array([0, *[1] * 30, 0]) > 0)], 64)
    (found,) = data.blanks(rows, bert, 1)
    hidden = [i for i, token in enumerate(found.ids) if token == 4]
    assert hidden == list(range(4, 31, 7))
    assert [token if i not in hidden else text[i] for i, token in enumerate(found.ids)] == text
    assert found.answer.split(", ") == [bert.decode([text[i]]).strip() for i in hidden]
    assert found.text.count("[MASK]") == 4
    assert "[CLS]" not in found.text
    assert "[SEP]" not in found.text


def test_blanks_of_a_short_or_long_text_have_a_gap_and_an_end(bert):
    short = Example(np.array([2, 6, 3]), np.array([0, 1, 0]) > 0)
    long = Example(np.array([2, *[5] * 200, 3]), np.array([0, *[1] * 200, 0]) > 0)
    found = data.blanks(in_memory([short, long], 256), bert, 2)
    assert (found[0].ids, found[0].answer) == ([2, 4, 3], "lamp")
    assert len(found[1].ids) == 40
    assert data.blanks(in_memory([short], 64), bert, 0) == []
