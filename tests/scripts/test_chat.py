import io

import jax
import numpy as np
import pytest

import jaxsft
from jaxsft import data, hub, lora, sample, tree

from .conftest import load_script


def test_pieces_of_a_stream_join_to_the_text_and_never_cut_a_character():
    tokenizer = hub.load_tokenizer(jaxsft.BASE)
    text = "A猫🐈 says 你好."
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    parts = list(load_script("chat").pieces(tokenizer, iter(ids)))
    assert "".join(parts) == text
    assert all("\ufffd" not in part for part in parts)


@pytest.fixture(scope="module")
def answer():
    """Turns -> the answer that `generate` gives."""
    model, params = hub.load(jaxsft.BASE)
    tokenizer = hub.load_tokenizer(jaxsft.BASE)

    def ask(*turns: str) -> str:
        roles = ("user", "assistant") * len(turns)
        prompt = data.prompt_ids([data.Message(*turn) for turn in zip(roles, turns, strict=False)], tokenizer)
        stop = hub.stop_tokens(jaxsft.BASE, tokenizer)
        [ids] = sample.generate(model, {"params": params}, [prompt], max_new_tokens=6, stop=stop)
        return tokenizer.decode(ids, skip_special_tokens=True)

    return ask


def test_one_question_prints_the_answer_that_generate_gives(run_here, capsys, answer):
    run_here("chat", "--model", jaxsft.BASE, "--ask", "Who are you?", "--sample.max_new_tokens", "6")
    assert capsys.readouterr().out == answer("Who are you?") + "\n"


def test_an_adapter_can_be_asked_on_packed_kernels(run_here, capsys, tmp_path, monkeypatch):
    family, shape = hub.read_config(hub.resolve(jaxsft.BASE))
    spec = lora.LoRA(rank=2)
    adapter = lora.init(jax.random.key(0), hub.shapes(shape), spec)
    hub.export_adapter(str(tmp_path), adapter, spec, family=family, base=jaxsft.BASE)
    asked = []
    monkeypatch.setattr(sample, "stream", lambda model, variables, *_, **__: iter(asked.append(variables) or []))
    run_here("chat", "--model", jaxsft.BASE, "--adapter", str(tmp_path), "--quantise", "nf4", "--ask", "Who are you?")
    [variables] = asked
    _, base = hub.load_variables(jaxsft.BASE, quantise="nf4")
    for path, x in tree.flat(base | {"lora": adapter}).items():
        np.testing.assert_array_equal(tree.flat(variables)[path], x)


def test_a_conversation_remembers_until_it_is_told_to_forget(run_here, capsys, monkeypatch, answer):
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\nAnd then?\n/new\nAnd then?\n\nnever read\n"))
    run_here("chat", "--model", jaxsft.BASE, "--sample.max_new_tokens", "6")
    first = answer("Hello")
    second = answer("Hello", first, "And then?")
    wanted = [first, second, answer("And then?")]
    assert capsys.readouterr().out == "".join(text + "\n" for text in wanted)


def test_a_missing_model_says_what_to_give(run_here):
    with pytest.raises(hub.CheckpointError, match="no model folder 'jaxsft/assets/bsae'; jaxsft/assets has 'base'"):
        run_here("chat", "--model", "jaxsft/assets/bsae", "--ask", "hi")
