"""The shipped tokenizer: what `scripts/tokenizer.py` made of `configs/base_tokenizer.yaml`."""

import json
import runpy
from pathlib import Path

import pytest
from transformers import AutoTokenizer

ROOT = Path(__file__).parents[2]
BASE = ROOT / "jaxsft/assets/base"
NASTY = [
    "",
    " ",
    "  two spaces  ",
    "\n\n\n",
    "\r\n\t \x0b\x0c\u00a0\u2028\u3000x",
    "\x00\x01\x1b[0m\x7f\x85\ufeff\ufffd",
    "don't, WE'LL , 'tis ; a . b ? c !",
    "1234567890 ١٢٣ ⅷ ²",
    "def f(x):\n\treturn {'a': x[0]}  # why?\n\n    pass\n",
    "灯塔图书馆几点开门？九点半。",
    "床前明月光，疑是地上霜。\n舉頭望明月",
    "〇々〆 𨣧𪒶 ひらがな カタカナ 한국어",
    "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇨🇳",
    "e\u0301 vs é, a\u0308\u0323, ﬁ, Å Å, ẛ̣",
    "\u0301starts with a mark",
    "שָׁלוֹם السَّلَامُ ภาษาไทย हिन्दी",
    "\u202ereversed\u202c \u200b\u200d\U0010ffff\ue000",
    "a<|im_end|> b<|endoftext|>\n<|im_start|>user",
    "<|im_end <|im_end|",
    "x" * 300,
]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(BASE, local_files_only=True)


@pytest.mark.parametrize("text", NASTY)
def test_any_text_comes_back_as_it_was(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= token < 2560 for token in ids)


def test_every_code_point_comes_back_as_it_was(tokenizer):
    text = "".join(chr(c) for c in range(0x30000) if not 0xD800 <= c < 0xE000)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_have_the_ids_of_the_model(tokenizer):
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]) == [0, 1, 2]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (None, "<|im_end|>", "<|endoftext|>")
    model = json.loads((BASE / "config.json").read_text())
    assert (model["eos_token_id"], model["pad_token_id"]) == (tokenizer.eos_token_id, tokenizer.pad_token_id) == (2, 0)
    assert len(tokenizer) == model["vocab_size"] == 2560
    assert set(tokenizer.get_vocab().values()) == set(range(2560))
    assert tokenizer.model_max_length == model["max_position_embeddings"]


def test_nothing_is_added_around_a_text(tokenizer):
    assert tokenizer("one", add_special_tokens=True).input_ids == tokenizer("one", add_special_tokens=False).input_ids
    assert tokenizer.decode([1, *tokenizer.encode("你好"), 2], skip_special_tokens=True) == "你好"


def test_a_digit_and_a_chinese_character_share_no_token(tokenizer):
    pieces = [tokenizer.decode([token]) for token in tokenizer.encode("1874 图书馆")]
    assert pieces == ["1", "8", "7", "4", " ", "图", "书", "馆"]


def test_the_chat_template_is_plain_chatml(tokenizer):
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": " 你是谁？\n"},
        {"role": "assistant", "content": "A model."},
    ]
    text = (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\n 你是谁？\n<|im_end|>\n"
        "<|im_start|>assistant\nA model.<|im_end|>\n"
    )
    assert tokenizer.apply_chat_template(turns, tokenize=False) == text
    prompt = tokenizer.apply_chat_template(turns[:2], tokenize=False, add_generation_prompt=True)
    assert prompt == text.removesuffix("A model.<|im_end|>\n")
    ids = tokenizer.encode(text)
    assert (ids[0], ids.count(1), ids.count(2)) == (1, 3, 3)


def test_the_script_trains_what_transformers_loads(tmp_path):
    script = runpy.run_path(str(ROOT / "scripts/tokenizer.py"))
    texts = list(script["read_texts"]([str(ROOT / "jaxsft/assets/text/notes.jsonl")]))
    script["save"](script["train"](texts, 400), tmp_path, 64)
    small = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert len(small) == 400
    assert all(small.decode(small.encode(text)) == text for text in [*texts, *NASTY])
    with pytest.raises(ValueError, match="lower it or add text"):
        script["train"](["too short"], 400)
    (tmp_path / "text.pdf").write_text("%PDF")
    with pytest.raises(ValueError, match=r"text.pdf is of no known kind '.pdf'"):
        list(script["read_texts"]([str(tmp_path / "text.pdf")]))
