import io
import json

import jax
import numpy as np
import pytest

import jaxsft
from jaxsft import data, hub, lora, models, sample, tree
from jaxsft.run import RunError


@pytest.fixture(scope="module")
def answer():
    """Turns -> the answer that `generate` gives."""
    model, params = hub.load(jaxsft.BASE)
    tokenizer = hub.load_tokenizer(jaxsft.BASE)

    def ask(*turns: str) -> str:
        roles = ("user", "assistant") * len(turns)
        prompt = data.prompt_ids([data.Message(*turn) for turn in zip(roles, turns, strict=False)], tokenizer)
        stop = hub.stop_tokens(jaxsft.BASE, tokenizer)
        [ids] = sample.answers(sample.generate(model, {"params": params}, [prompt], max_new_tokens=6, stop=stop))
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


def test_a_reward_model_and_its_adapter_do_not_talk(run_here, tmp_path):
    (family, shape), spec = hub.read_config(hub.resolve(jaxsft.BASE)), lora.LoRA(rank=2)
    trained = {"score": {"kernel": np.ones((192, 1), np.float32)}}
    adapter = lora.init(jax.random.key(0), hub.shapes(shape), spec)
    hub.export_adapter(str(tmp_path / "low"), adapter, spec, family=family, base=jaxsft.BASE, trained=trained)
    with pytest.raises(RunError, match="is the adapter of a reward model, which scores texts and writes none"):
        run_here("chat", "--model", jaxsft.BASE, "--adapter", str(tmp_path / "low"), "--ask", "Hi")
    hub.merge(jaxsft.BASE, str(tmp_path / "judge"), trained=trained)
    with pytest.raises(
        ValueError, match="this model scores whole texts and has no output layer, so it predicts no tok"
    ):
        run_here("chat", "--model", str(tmp_path / "judge"), "--ask", "Hi")


def test_a_conversation_remembers_until_it_is_told_to_forget(run_here, capsys, monkeypatch, answer):
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\nAnd then?\n/new\nAnd then?\n\nnever read\n"))
    run_here("chat", "--model", jaxsft.BASE, "--sample.max_new_tokens", "6")
    first = answer("Hello")
    second = answer("Hello", first, "And then?")
    wanted = [first, second, answer("And then?")]
    assert capsys.readouterr().out == "".join(text + "\n" for text in wanted)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Two folders, an adapter of some size in each, and their trees."""
    found = {}
    for number, name in enumerate(("calm", "wild")):
        spec = lora.LoRA(rank=number + 1, alpha=4.0, targets=".*/(q|down)")
        low = lora.init(jax.random.key(number), hub.on_disk(jaxsft.BASE), spec)
        low = jax.tree.map(lambda x: x + 0.2, low)
        folder = str(tmp_path_factory.mktemp(name))
        hub.export_adapter(folder, low, spec, family=models.FAMILIES["llama"], base=jaxsft.BASE)
        found[name] = folder, low
    return found


def test_adapters_take_turns_over_one_base_in_one_conversation(run_here, capsys, monkeypatch, adapters):
    seen, tokenizer = [], hub.load_tokenizer(jaxsft.BASE)

    def stream(model, variables, prompt, **_):
        seen.append((variables, tokenizer.decode(prompt)))
        return iter(tokenizer("Yes.", add_special_tokens=False)["input_ids"])

    said = "One?\n/use wild\nTwo?\n/use base\nThree?\n/use tame\n/new\nFour?\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(said))
    monkeypatch.setattr(sample, "stream", stream)
    folders = json.dumps({name: folder for name, (folder, _) in adapters.items()})
    run_here("chat", "--model", jaxsft.BASE, "--adapters", folders)
    told = [
        "Yes.",
        "wild answers",
        "Yes.",
        "base answers",
        "Yes.",
        "there is no 'tame'; there are calm, wild, base",
        "Yes.",
    ]
    assert capsys.readouterr().out.splitlines() == told
    for (variables, _), name in zip(seen, ("calm", "wild", None, None), strict=True):
        assert ("lora" in variables) == (name is not None)
        for path, leaf in tree.flat(adapters[name][1] if name else {}).items():
            np.testing.assert_allclose(tree.flat(variables["lora"])[path], leaf, rtol=1e-6)
    tables = {id(variables["params"]["embed"]["table"]) for variables, _ in seen}
    assert len(tables) == 1  # the base is there once
    asked = [[word for word in ("One?", "Two?", "Three?", "Four?") if word in prompt] for _, prompt in seen]
    assert asked == [["One?"], ["One?", "Two?"], ["One?", "Two?", "Three?"], ["Four?"]]


def test_one_adapter_or_several_and_none_called_base(run_here):
    with pytest.raises(RunError, match="give either adapter, one folder, or adapters"):
        run_here("chat", "--model", jaxsft.BASE, "--adapter", "a", "--adapters", '{"b": "c"}')
    with pytest.raises(RunError, match="an adapter cannot be called base"):
        run_here("chat", "--model", jaxsft.BASE, "--adapters", '{"base": "c"}')


def test_a_missing_model_says_what_to_give(run_here):
    with pytest.raises(hub.CheckpointError, match="no model folder 'jaxsft/assets/bsae'; jaxsft/assets has 'base'"):
        run_here("chat", "--model", "jaxsft/assets/bsae", "--ask", "hi")
