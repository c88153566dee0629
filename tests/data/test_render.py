import json
from types import SimpleNamespace

import pytest

from jaxsft.data import DataError
from jaxsft.data.chat import Conversation, Message, Text
from jaxsft.data.render import prompt_ids, render, render_text
from jaxsft.data.templates import with_template

CHINESE = "你好，龘！🙂"


def talk(*contents, system=None):
    """user, assistant, user, ..."""
    head = [Message("system", system)] if system else []
    roles = ("user", "assistant")
    return Conversation((*head, *(Message(roles[i % 2], content) for i, content in enumerate(contents))))


def runs(example, tokenizer):
    """The stretches of learned tokens, decoded."""
    found, run = [], []
    for number, learned in [*zip(example.ids.tolist(), example.mask, strict=True), (0, False)]:
        if learned:
            run.append(number)
        elif run:
            found.append(tokenizer.decode(run))
            run = []
    return found


def piecewise(conversation, tokenizer):
    """ChatML written out piece by piece: ids and mask from a plain loop, no offsets."""
    ids, mask = [], []
    for role, content, *_ in conversation.messages:
        answer = role == "assistant"
        for piece, learned in (
            (f"<|im_start|>{role}\n", False),
            (content, answer),
            ("<|im_end|>", answer),
            ("\n", False),
        ):
            new = tokenizer(piece, add_special_tokens=False)["input_ids"]
            ids += new
            mask += [learned] * len(new)
    return ids[:-1], mask[:-1]  # nothing is learned from the last newline


def test_mask_of_one_turn_token_by_token(chatml):
    example = render(talk("hello", "good night"), chatml)
    names = chatml.convert_ids_to_tokens(example.ids.tolist())
    assert [f"{name} {int(learned)}" for name, learned in zip(names, example.mask, strict=True)] == [
        *("<|im_start|> 0", "user 0", "Ċ 0", "hel 0", "lo 0", "<|im_end|> 0", "Ċ 0"),
        *("<|im_start|> 0", "as 0", "sistant 0", "Ċ 0", "go 1", "od 1", "Ġnight 1", "<|im_end|> 1"),
    ]
    assert example.ids.dtype == "int32"
    assert example.mask.dtype == bool


@pytest.mark.parametrize(
    "conversation",
    [
        talk("hello", "good night"),
        talk("hello", "world", "good", "bye", "and", "x", system="be kind"),
        talk(CHINESE, CHINESE, "再见", "龘"),
        talk("hello", ""),
        talk("hello", "line\n\n  indented\n\tdef f():\n        pass"),
        talk("assistant", "user assistant system"),
    ],
)
def test_every_assistant_turn_is_learned_as_written_piece_by_piece(chatml, conversation):
    example = render(conversation, chatml)
    ids, mask = piecewise(conversation, chatml)
    assert example.ids.tolist() == ids
    assert example.mask.tolist() == mask
    answers = [content + "<|im_end|>" for role, content, *_ in conversation.messages if role == "assistant"]
    assert runs(example, chatml) == answers


def test_real_tokenizers_agree_with_the_loop(real):
    conversation = talk("Hello there", "Good night.\n\n- one\n- two", CHINESE, CHINESE, system="Be kind")
    example = render(conversation, real)
    assert runs(example, real) == ["Good night.\n\n- one\n- two<|im_end|>", f"{CHINESE}<|im_end|>"]
    if "<think>" not in real.chat_template:
        ids, mask = piecewise(conversation, real)
        assert (example.ids.tolist(), example.mask.tolist()) == (ids, mask)


def test_every_alpaca_demo_row_learns_its_answer(real, shared):
    for language in ("en", "zh"):
        rows = json.loads((shared / f"sft_llamafactory/alpaca_{language}_demo.json").read_text(encoding="utf-8"))
        for row in rows[:50]:
            example = render(talk(row["instruction"] + "\n" + row["input"], row["output"]), real)
            learned = real.decode(example.ids[example.mask].tolist(), clean_up_tokenization_spaces=False)
            assert learned == row["output"] + "<|im_end|>"


def test_the_stop_token_is_learned_last_even_when_it_is_the_pad_token(chatml):
    assert chatml.pad_token_id == chatml.eos_token_id
    example = render(talk("hello", "world"), chatml)
    assert example.mask[-1]
    assert example.ids[-1] == chatml.eos_token_id


def test_a_newline_after_the_stop_token_is_not_learned(chatml):
    example = render(talk("hello", "world", "hello", "bye"), chatml)
    newline = chatml.convert_tokens_to_ids("Ċ")
    assert newline not in example.ids[example.mask]


def test_a_prompt_is_what_render_writes_before_the_answer(chatml, real):
    for tokenizer in (chatml, real):
        conversation = talk("hello", "world", CHINESE, "bye", system="be kind")
        example = render(conversation, tokenizer)
        prompt = prompt_ids(conversation.messages[:-1], tokenizer)
        start = len(example.ids) - 1 - example.mask[::-1].argmin()
        assert example.ids[: start + 1].tolist() == prompt


def test_default_template_has_one_bos_though_the_tokenizer_adds_its_own(with_bos):
    tokenizer = with_template(with_bos)
    assert tokenizer("hello")["input_ids"][0] == tokenizer.bos_token_id  # it would be a second one
    example = render(talk("hello", "world", "good", "bye"), tokenizer)
    assert (example.ids == tokenizer.bos_token_id).sum() == 1
    assert example.ids[0] == tokenizer.bos_token_id
    assert prompt_ids([Message("user", "hello")], tokenizer).count(tokenizer.bos_token_id) == 1
    text = render_text(Text("hello"), tokenizer)
    assert (text.ids == tokenizer.bos_token_id).sum() == 1


def test_default_template_word_by_word(make):
    tokenizer = with_template(make(bos_token="<s>", eos_token="<|im_end|>"))
    example = render(talk("hello", "world", "good", "bye", system="be kind"), tokenizer)
    assert tokenizer.decode(example.ids.tolist()) == (
        "<s>be kind\n\n### Instruction:\nhello\n\n### Response:\nworld<|im_end|>\n\n"
        "### Instruction:\ngood\n\n### Response:\nbye<|im_end|>"
    )
    assert runs(example, tokenizer) == ["world<|im_end|>", "bye<|im_end|>"]


def test_a_template_of_its_own_stays(chatml):
    before = chatml.chat_template
    assert with_template(chatml).chat_template == before


def test_without_a_stop_token_the_whole_turn_is_learned(make):
    template = (
        "{% for m in messages %}{{ m.role[0] + ': ' + m.content + '\n' }}{% endfor %}"
        "{{ 'a:' if add_generation_prompt }}"
    )
    tokenizer = make(eos_token="<|im_end|>", chat_template=template)
    example = render(talk("hello", "<|im_end|> in the middle"), tokenizer)
    assert runs(example, tokenizer) == [" <|im_end|> in the middle\n"]


def test_trimmed_offsets_leave_the_space_before_an_answer_in_the_prompt(make):
    from tokenizers import processors

    template = "{% for m in messages %}{{ m.role[0] + ': ' + m.content + '<|im_end|>' }}{% endfor %}"
    tokenizer = make(eos_token="<|im_end|>", chat_template=template + "{{ 'a: ' if add_generation_prompt }}")
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    example = render(talk("x", "龘  龘"), tokenizer)
    assert runs(example, tokenizer) == ["龘  龘<|im_end|>"]


QWEN3 = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' %}{{ '<think>\n\n</think>\n\n' if loop.last }}{{ m.content.split('</think>')[-1] }}"
    "{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{{ '<|im_start|>assistant\n' if add_generation_prompt }}"
)


def test_a_template_that_keeps_thinking_in_the_last_turn_only(make):
    tokenizer = make(eos_token="<|im_end|>", chat_template=QWEN3)
    example = render(talk("hello", "world one", "good", "bye"), tokenizer)
    assert runs(example, tokenizer) == ["world one<|im_end|>", "<think>\n\n</think>\n\nbye<|im_end|>"]


LAST_FIRST = "{% for m in messages | reverse %}{{ m.role[0] + ':' }}BODY{{ '<|im_end|>' }}{% endfor %}"


def test_generation_marks_decide_where_turns_cannot_be_told(make):
    body = "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}"
    body += "{% else %}{{ m.content }}{% endif %}"
    tokenizer = make(eos_token="<|im_end|>", chat_template=LAST_FIRST.replace("BODY", body))
    example = render(talk("hello", "world", "good", CHINESE), tokenizer)
    assert runs(example, tokenizer) == [f"{CHINESE}<|im_end|>", "world<|im_end|>"]


def test_a_template_that_is_no_sequence_of_turns_is_refused(make):
    tokenizer = make(eos_token="<|im_end|>", chat_template=LAST_FIRST.replace("BODY", "{{ m.content }}"))
    with pytest.raises(DataError, match=r"does not write message 2 as an addition .*\{% generation %\}"):
        render(talk("hello", "world", "good", "bye"), tokenizer)


def test_what_the_template_refuses_is_named(make):
    tokenizer = make(eos_token="<|im_end|>", chat_template="{{ raise_exception('no system role') }}")
    with pytest.raises(DataError, match=r"refuses turns system, user, assistant .no system role.; change"):
        render(talk("hello", "world", system="be kind"), tokenizer)


def test_a_tokenizer_without_offsets_is_refused_by_name():
    with pytest.raises(DataError, match=r"SimpleNamespace gives no character offsets.*tokenizer\.json"):
        render(talk("hello", "world"), SimpleNamespace(is_fast=False))


def test_text_is_learned_whole_after_its_first_token(chatml, with_bos):
    for tokenizer, first in ((chatml, "<|im_end|>"), (with_bos, "<s>")):
        example = render_text(Text(CHINESE + " hello"), tokenizer)
        assert tokenizer.decode(example.ids.tolist()) == f"{first}{CHINESE} hello<|im_end|>"
        assert example.mask.tolist() == [False] + [True] * (len(example.ids) - 1)


def test_text_needs_an_eos(make):
    with pytest.raises(DataError, match="no eos_token"):
        render_text(Text("hello"), make())
