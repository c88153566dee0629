"""What holds for any text that people may bring."""

import json
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxsft import data
from jaxsft.data import Config, Conversation, Example, Message, batches, in_memory, render
from jaxsft.data.chat import Text
from jaxsft.data.pack import chunks, fill, plan, truncate
from jaxsft.data.render import prompt_ids, render_text

from .conftest import documents
from .test_render import runs

QUICK = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
PIECES = [
    "<|im_end|>",
    "<|im_start|>",
    "<s>",
    "\n",
    " ",
    "hello",
    "\u2028",
    "\ufdd0",
    "🙂",
    "龘",
    "<think>",
    "\x00",
    "é",
]
ANY = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
TEXTS = st.one_of(ANY, st.lists(st.one_of(st.sampled_from(PIECES), ANY), max_size=6).map("".join))


@pytest.fixture(scope="module")
def tokenizers(make):
    plain = data.with_template(make(eos_token="<|im_end|>", pad_token="<|im_end|>"), "chatml")
    return [plain, data.with_template(make(bos_token="<s>", eos_token="<|im_end|>"), "alpaca")]


@QUICK
@given(turns=st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=3), system=TEXTS)
def test_what_is_learned_decodes_to_the_answers_and_their_stop_tokens(tokenizers, turns, system):
    messages = [Message("system", system)] if system else []
    for asked, answered in turns:
        messages += [Message("user", asked), Message("assistant", answered)]
    for tokenizer in tokenizers:
        example = render(Conversation(tuple(messages)), tokenizer)
        assert runs(example, tokenizer) == [answer + "<|im_end|>" for _, answer in turns]
        prompt = prompt_ids(messages[:-1], tokenizer)
        assert example.ids[: len(prompt)].tolist() == prompt
        control = [tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|im_start|>", "<s>")]
        empty = render(Conversation(tuple(m._replace(content="x") for m in messages)), tokenizer)
        assert [(example.ids == c).sum() for c in control] == [(empty.ids == c).sum() for c in control]


@QUICK
@given(text=TEXTS)
def test_a_text_decodes_to_itself_between_its_ends(tokenizers, text):
    for tokenizer in tokenizers:
        example = render_text(Text(text), tokenizer)
        assert tokenizer.decode(example.ids[1:]) == text + "<|im_end|>"
        assert example.mask.tolist() == [False] + [True] * (len(example.ids) - 1)


EXAMPLES = st.lists(st.lists(st.booleans(), min_size=1, max_size=24), min_size=1, max_size=30)


@QUICK
@given(masks=EXAMPLES, length=st.integers(2, 24))
def test_no_token_is_lost_or_doubled_by_cutting_texts_and_packing(masks, length):
    texts, at = [], 0
    for mask in masks:
        texts.append(Example(np.arange(at, at + len(mask)), np.arange(len(mask)) > 0))
        at += len(mask)
    pieces = [piece for text in texts for piece in chunks(text, length)]
    order, rows = plan(np.array([len(piece.ids) for piece in pieces]), length)
    packed = [fill([pieces[i] for i in order[a:b]], length) for a, b in pairwise(rows)]
    learned = Counter(number for row in packed for number in row.tokens[row.mask].tolist())
    assert learned == Counter(number for text in texts for number in text.ids[1:].tolist())
    assert sum(int((row.segments > 0).sum()) for row in packed) == sum(len(piece.ids) for piece in pieces)


@QUICK
@given(mask=st.lists(st.booleans(), min_size=1, max_size=60), length=st.integers(2, 60), last=st.booleans())
def test_a_cut_keeps_order_and_masks_and_is_no_longer_than_it_may_be(mask, length, last):
    example = Example(np.arange(len(mask)), np.array(mask))
    cut = truncate(example, length, last_first=last)
    assert len(cut.ids) <= length
    assert (np.diff(cut.ids) > 0).all()
    assert (cut.mask == example.mask[cut.ids]).all()


@settings(QUICK, max_examples=25)
@given(
    sizes=st.lists(st.integers(1, 8), min_size=1, max_size=25),
    size=st.integers(1, 5),
    seed=st.integers(0, 99),
    at=st.integers(0, 12),
)
def test_any_order_goes_on_from_any_place(sizes, size, seed, at):
    rows = in_memory([Example(np.full(n, i), np.arange(n) > 0) for i, n in enumerate(sizes)], 8)
    take = lambda position, count: [
        (batch.tokens.tokens.tolist(), batch.position)
        for batch, _ in zip(batches(rows, size, seed=seed, epochs=None, position=position), range(count), strict=False)
    ]
    whole = take(None, at + 4)
    assert take(whole[at][1], 3) == whole[at + 1 :]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data_=st.data())
def test_any_mixture_holds_out_no_row_that_it_learns(tmp_path_factory, tokenizers, data_):
    folder = tmp_path_factory.mktemp("mixture")
    texts = data_.draw(st.lists(st.sampled_from("abcdefghijkl"), min_size=8, max_size=30))
    half = len(texts) // 2
    sources = []
    for name, part in (("one", texts[:half]), ("two", texts[half:])):
        path = folder / f"{name}.jsonl"
        path.write_text("\n".join(json.dumps({"text": text}) for text in part), encoding="utf-8")
        sources.append(data.Source(str(path), epochs=data_.draw(st.sampled_from([1.0, 2.0, 2.5]))))
    if len(set(texts)) < 3:
        return
    config = Config(
        train=sources, val_fraction=0.4, max_length=16, seed=data_.draw(st.integers(0, 9)), cache=str(folder)
    )
    train, held, report = data.load(config, tokenizers[0])
    learned, measured = set(documents(train)), set(documents(held))
    assert not learned & measured
    assert len(learned | measured) <= len(set(texts))
    assert report.rows == len(documents(train))


@pytest.mark.parity  # a long one
def test_a_row_of_ten_megabytes(tmp_path, tokenizers):
    path = tmp_path / "large.jsonl"
    path.write_text(json.dumps({"instruction": "a", "output": "hello world " * 850_000}), encoding="utf-8")
    report = data.load(Config(train=str(path), max_length=1024), tokenizers[0]).report
    assert report.rows == 1
    assert report.longest[0] > 1_000_000
