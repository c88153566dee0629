import io

import pytest

import jaxsft
from jaxsft import data, hub, sample

from .conftest import load_script


def test_pieces_of_a_stream_join_to_the_text_and_never_cut_a_character():
    tokenizer = hub.load_tokenizer(jaxsft.BASE)
    text = "A猫🐈 says 你好."
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    parts = list(load_script("chat").pieces(tokenizer, iter(ids)))
    assert "".join(parts) == text
    assert all("\ufffd" not in part for part in parts)


def test_one_question_prints_the_answer_that_generate_gives(run_here, capsys):
    run_here("chat", "--model", jaxsft.BASE, "--ask", "Who are you?", "--sample.max_new_tokens", "8")
    model, params = hub.load(jaxsft.BASE)
    tokenizer = hub.load_tokenizer(jaxsft.BASE)
    prompt = data.prompt_ids([data.Message("user", "Who are you?")], tokenizer)
    stop = hub.stop_tokens(jaxsft.BASE, tokenizer)
    [answer] = sample.generate(model, {"params": params}, [prompt], max_new_tokens=8, stop=stop)
    assert capsys.readouterr().out == tokenizer.decode(answer) + "\n"


def test_a_conversation_goes_on_until_an_empty_line(run_here, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\nAnd then?\n/new\nHello\n\nnever read\n"))
    run_here("chat", "--model", jaxsft.BASE, "--sample.max_new_tokens", "6")
    out = capsys.readouterr().out
    assert out.count("\n") >= 3
    hello = out[: len(out) // 3]
    assert out.count(hello.split("\n")[0]) >= 2  # /new forgets: the same greeting gets the same answer


def test_a_missing_model_says_what_to_give(run_here):
    with pytest.raises(hub.CheckpointError, match="no model folder 'jaxsft/assets/bsae'; jaxsft/assets has 'base'"):
        run_here("chat", "--model", "jaxsft/assets/bsae", "--ask", "hi")
