"""Named templates against plain loops that write the same."""

import json

import pytest

from jaxsft.data import TEMPLATES, Conversation, DataError, Message, Prompt, ToolCall, render, with_template
from jaxsft.data.script import scripts, write
from jaxsft.data.templates import source

TOKENS = {token for one in TEMPLATES.values() for token in one.tokens}
TURNS = (("system", "be kind"), ("user", "hello"), ("assistant", "world"), ("user", "good"), ("assistant", "bye\n x"))
BOS, EOS = "<s>", "</s>"


@pytest.fixture(scope="module")
def fitted(make):
    """fitted(name) -> a tokenizer that has all tokens, with the template."""

    def fitted(name, **options):
        tokenizer = make(**{"bos_token": BOS, "eos_token": EOS} | options)
        tokenizer.add_special_tokens({"additional_special_tokens": sorted(TOKENS)})
        return with_template(tokenizer, name)

    return fitted


def merged(turns):
    """A system message goes into the first turn of the user."""
    if turns[0][0] != "system":
        return turns
    return ((turns[1][0], f"{turns[0][1]}\n\n{turns[1][1]}"), *turns[2:])


def chatml(turns):
    return "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)


def llama3(turns):
    return BOS + "".join(f"<|start_header_id|>{r}<|end_header_id|>\n\n{c}<|eot_id|>" for r, c in turns)


def phi(turns):
    return "".join(f"<|{role}|>\n{content}<|end|>\n" for role, content in turns)


def gemma(turns):
    names = {"user": "user", "assistant": "model"}
    return BOS + "".join(f"<start_of_turn>{names[r]}\n{c}<end_of_turn>\n" for r, c in merged(turns))


def mistral(turns):
    return BOS + "".join(f"[INST] {c}[/INST]" if r == "user" else f" {c}{EOS}" for r, c in merged(turns))


def by_role(turns, **forms):
    return BOS + "".join(forms[role].format(content) for role, content in turns)


def alpaca(turns):
    answer = "### Response:\n{}" + EOS + "\n\n"
    return by_role(turns, system="{}\n\n", user="### Instruction:\n{}\n\n", assistant=answer)


def deepseek(turns):
    return by_role(turns, system="{}\n\n", user="User: {}\n\n", assistant="Assistant: {}" + EOS)


def plain(turns):
    return by_role(turns, system="{}\n", user="{}\n", assistant="{}" + EOS)


def vicuna(turns):
    return by_role(turns, system="{} ", user="USER: {}", assistant=" ASSISTANT: {}" + EOS)


LOOPS = {loop.__name__: loop for loop in (alpaca, chatml, deepseek, gemma, llama3, mistral, phi, plain, vicuna)}
named = pytest.mark.parametrize("name", TEMPLATES)


def messages(turns):
    return tuple(Message(role, content) for role, content in turns)


@named
@pytest.mark.parametrize("turns", [TURNS, TURNS[1:], TURNS[1:3], (TURNS[1], ("assistant", ""))])
def test_a_template_writes_what_a_loop_writes(name, turns, fitted):
    assert write(messages(turns), (), fitted(name)) == LOOPS[name](turns)


@named
def test_a_generation_prompt_is_what_stands_before_the_answer(name, fitted):
    tokenizer = fitted(name)
    for turns in (TURNS, TURNS[1:], TURNS[:3]):
        full = write(messages(turns), (), tokenizer)
        asked = write(messages(turns[:-1]), (), tokenizer, add_generation_prompt=True)
        assert full.startswith(asked)
        assert full[len(asked) :].strip().startswith(turns[-1][1])
        (script,) = scripts(Prompt(messages(turns[:-1])), tokenizer)
        assert script.text == asked


@named
def test_the_stop_token_becomes_eos_and_ends_every_answer_learned(name, fitted):
    tokenizer = fitted(name)
    stop = TEMPLATES[name].stop or EOS
    assert tokenizer.eos_token == stop
    example = render(Conversation(messages(TURNS)), tokenizer)
    learned = tokenizer.decode(example.ids[example.mask].tolist())
    assert [answer.strip() for answer in learned.split(stop)] == ["world", "bye\n x", ""]
    assert learned.count(stop) == 2
    assert (example.ids[-1], example.mask[-1]) == (tokenizer.eos_token_id, True)


@named
@pytest.mark.parametrize("bos", [BOS, None])
def test_there_is_one_bos_at_most_and_it_comes_first(name, bos, fitted):
    tokenizer = fitted(name, bos_token=bos)
    example = render(Conversation(messages(TURNS)), tokenizer)
    where = (example.ids == tokenizer.convert_tokens_to_ids(BOS)).nonzero()[0].tolist()
    assert where == ([0] if bos and LOOPS[name](TURNS).startswith(BOS) else [])


@named
def test_tokens_that_are_missing_are_named_with_templates_that_need_none(name, make):
    tokenizer = make(eos_token="<|im_end|>")
    missing = [token for token in TEMPLATES[name].tokens if token not in tokenizer.get_vocab()]
    if not missing:
        assert with_template(tokenizer, name).chat_template == source(name)
        return
    free = "alpaca, deepseek, mistral, plain, vicuna"
    with pytest.raises(DataError) as error:
        with_template(tokenizer, name)
    assert str(error.value).startswith(f"data.template {name} needs {', '.join(missing)}, which the tokenizer does not")
    assert str(error.value).endswith(free)
    assert (tokenizer.eos_token, tokenizer.chat_template) == ("<|im_end|>", None)


def test_a_template_that_ends_answers_with_eos_needs_one(make):
    with pytest.raises(DataError, match="data.template plain ends answers with eos_token, and the tokenizer has none"):
        with_template(make(), "plain")


def test_a_file_is_a_template(make, tmp_path):
    (tmp_path / "mine.jinja").write_text("{% for m in messages %}{{ '龘' + m.content }}{% endfor %}", encoding="utf-8")
    tokenizer = with_template(make(eos_token=EOS), str(tmp_path / "mine.jinja"))
    assert write(messages(TURNS[1:3]), (), tokenizer) == "龘hello龘world"
    assert tokenizer.eos_token == EOS


@pytest.mark.parametrize("name", ["chatm", "no.jinja", "ChatML"])
def test_an_unknown_name_is_told_the_known_ones(make, name):
    listed = "alpaca, chatml, deepseek, gemma, llama3, mistral, phi, plain, vicuna"
    with pytest.raises(DataError, match=f"data.template is '{name}'; give one of {listed}, or the path of a .jinja"):
        with_template(make(), name)


def test_without_a_name_a_template_of_its_own_stays_and_alpaca_comes_where_there_is_none(chatml, make):
    before = chatml.chat_template
    assert with_template(chatml).chat_template == before
    assert with_template(make()).chat_template == source("alpaca")


# ---- tools, calls, reasoning ----------------------------------------------------------------------------------------

TOOLS = tuple({"type": "function", "function": {"name": name, "parameters": {"属": [1]}}} for name in ("add", "sub"))
CALLS = (ToolCall("add", {"a": 1, "b": "二<"}), ToolCall("sub", {}))
CALLED = (Message("user", "q"), Message("assistant", "", calls=CALLS), Message("tool", "3"), Message("tool", "4"))
CALLED += (Message("assistant", "seven"),)


def dump(value, **options):
    return json.dumps(value, ensure_ascii=False, **options)


def test_tools_and_calls_in_chatml(fitted):
    system = (
        "# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are provided with "
        "function signatures within <tools></tools> XML tags:\n<tools>\n"
        + "\n".join(map(dump, TOOLS))
        + "\n</tools>\n\nFor "
        "each function call, return a json object with function name and arguments within <tool_call></tool_call> XML "
        'tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
    )
    calls = [f"<tool_call>\n{dump({'name': c.name, 'arguments': c.arguments})}\n</tool_call>" for c in CALLS]
    results = "\n".join(f"<tool_response>\n{number}\n</tool_response>" for number in (3, 4))
    turns = [("user", "q"), ("assistant", "\n".join(calls)), ("user", results), ("assistant", "seven")]
    assert write(CALLED, TOOLS, fitted("chatml")) == chatml([("system", "\n\n" + system), *turns])
    kind = (Message("system", "be kind"), *CALLED)
    assert write(kind, TOOLS, fitted("chatml")) == chatml([("system", "be kind\n\n" + system), *turns])


def test_tools_and_calls_in_llama3(fitted):
    system = (
        "You have access to the following functions. To call a function, please respond with JSON for a function call. "
        'Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}. Do '
        "not use variables.\n\n" + "".join(dump(tool, indent=4) + "\n\n" for tool in TOOLS)
    )
    calls = "\n".join(dump({"name": call.name, "parameters": call.arguments}) for call in CALLS)
    turns = [("user", "q"), ("assistant", calls), ("ipython", "3"), ("ipython", "4"), ("assistant", "seven")]
    assert write(CALLED, TOOLS, fitted("llama3")) == llama3([("system", system), *turns])


def test_tools_and_calls_in_mistral(fitted):
    calls = dump([{"name": call.name, "arguments": call.arguments} for call in CALLS])
    results = "".join(f'[TOOL_RESULTS] {{"content": "{number}"}}[/TOOL_RESULTS]' for number in (3, 4))
    expected = f"{BOS}[AVAILABLE_TOOLS] {dump(list(TOOLS))}[/AVAILABLE_TOOLS][INST] q[/INST][TOOL_CALLS] {calls}{EOS}"
    assert write(CALLED, TOOLS, fitted("mistral")) == f"{expected}{results} seven{EOS}"


@pytest.mark.parametrize("name", ["chatml", "llama3", "mistral"])
def test_calls_are_learned_and_results_are_not(name, fitted):
    tokenizer = fitted(name)
    example = render(Conversation(CALLED, TOOLS), tokenizer)
    first, second, rest = tokenizer.decode(example.ids[example.mask].tolist()).split(tokenizer.eos_token)
    assert (second.strip(), rest) == ("seven", "")
    assert all(call.name in first and "二<" in first for call in CALLS)


@pytest.mark.parametrize("name", ["alpaca", "deepseek", "gemma", "phi", "plain", "vicuna"])
def test_a_template_without_calls_refuses_them(name, fitted):
    with pytest.raises(DataError, match="leaves out the calls of message 2 .assistant.; choose another"):
        write(CALLED, (), fitted(name))


@named
def test_reasoning_is_written_before_the_answer_in_think_tags(name, fitted):
    turns = (Message("user", "q"), Message("assistant", "a", reasoning="hm\nso"))
    expected = LOOPS[name]((("user", "q"), ("assistant", "<think>\nhm\nso\n</think>\n\na")))
    assert write(turns, (), fitted(name)) == expected
