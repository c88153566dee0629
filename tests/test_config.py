import ast
import dataclasses
import importlib.util
import inspect
import itertools
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from jaxsft import config

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Inner:
    rate: float = 0.1
    """how fast"""
    kind: Literal["cosine", "linear"] = "cosine"
    """which curve"""
    limit: int | None = None
    """the most"""


@dataclass(frozen=True)
class Outer:
    inner: Inner = Inner()
    other: Inner = Inner(rate=0.5)
    name: str = "none"
    """what it is called"""
    flag: bool = False
    """whether"""
    parts: list[str] = field(default_factory=list)
    """some words"""


@pytest.fixture
def yaml(tmp_path):
    def write(text):
        (tmp_path / "run.yaml").write_text(text)
        return str(tmp_path / "run.yaml")

    return write


@pytest.fixture(scope="module")
def sft():
    """scripts/sft.py as a module, in the way a script is: outside any package."""
    spec = importlib.util.spec_from_file_location("sft_script", ROOT / "scripts" / "sft.py")
    module = sys.modules["sft_script"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module.Config
    del sys.modules["sft_script"]


def refused(capsys, args, kind=Outer):
    """What a wrong command line says; it ends with status 2 and no traceback."""
    with pytest.raises(SystemExit) as end:
        config.parse(kind, args)
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert "Traceback" not in said
    return said


def test_without_arguments_all_values_are_the_defaults():
    assert config.parse(Outer, []) == Outer()


def test_yaml_overrides_defaults_and_the_command_line_overrides_yaml(yaml):
    file = yaml("inner:\n  rate: 0.2\n  limit: 7\nname: 你好\nparts: [a, b]\n")
    found = config.parse(Outer, ["--config", file, "--inner.rate", "3e-4", "--flag", "true"])
    assert found == Outer(inner=Inner(rate=3e-4, limit=7), name="你好", parts=["a", "b"], flag=True)


def test_a_section_keeps_its_own_defaults_where_one_key_of_it_is_given():
    assert config.parse(Outer, ["--other.kind", "linear"]).other == Inner(rate=0.5, kind="linear")


def test_values_have_their_declared_types(yaml):
    found = config.parse(Outer, ["--config", yaml("inner: {rate: 1}\n"), "--inner.limit", "null"])
    assert (found.inner.rate, type(found.inner.rate), found.inner.limit) == (1.0, float, None)


@pytest.mark.parametrize(
    ("args", "unknown", "near"),
    [
        (["--nmae", "x"], "nmae", "name"),
        (["--inner.rte", "1"], "inner.rte", "inner.rate"),
        (["--iner.rate", "1"], "iner.rate", "inner.rate"),
        (["--flga=true"], "flga", "flag"),
    ],
)
def test_an_unknown_key_on_the_command_line_names_the_nearest(capsys, args, unknown, near):
    said = refused(capsys, args)
    assert f"unknown key {unknown!r}; did you mean {near!r}? --help lists all keys" in said


@pytest.mark.parametrize(
    ("text", "unknown", "near"),
    [
        ("nmae: x\n", "nmae", "name"),
        ("inner:\n  rte: 1\n", "inner.rte", "inner.rate"),
        ("inner:\n  rate: 1\nother:\n  lmit: 1\n", "other.lmit", "other.limit"),
        ("inner: {rate: 1}\niner: {rate: 1}\n", "iner.rate", "inner.rate"),
    ],
)
def test_an_unknown_key_in_yaml_names_the_nearest(capsys, yaml, text, unknown, near):
    said = refused(capsys, ["--config", yaml(text)])
    assert f"unknown key {unknown!r}" in said
    assert f"did you mean {near}" in said.replace("'", "")


def test_a_key_like_no_other_is_refused_without_a_guess(capsys):
    assert "unknown key 'zzzzzzzz'; --help lists all keys" in refused(capsys, ["--zzzzzzzz", "1"])


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--inner.rate", "fast"], ("inner.rate", "fast", "float")),
        (["--inner.limit", "1.5"], ("inner.limit", "1.5")),
        (["--inner.kind", "cubic"], ("inner.kind", "cubic", "cosine")),
        (["--flag", "perhaps"], ("flag", "perhaps")),
        (["--name"], ("name",)),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_by_its_key(capsys, args, words):
    said = refused(capsys, args)
    assert all(word in said for word in words), said


def test_a_wrong_type_in_yaml_is_refused_by_its_key(capsys, yaml):
    said = refused(capsys, ["--config", yaml("inner:\n  rate: fast\n")])
    assert "rate" in said
    assert "fast" in said


def test_a_missing_config_file_is_named(capsys):
    assert "no/such/run.yaml" in refused(capsys, ["--config", "no/such/run.yaml"])


def test_yaml_that_does_not_parse_is_refused(capsys, yaml):
    file = yaml("inner: {rate: 1\nname: [")
    assert str(file) in refused(capsys, ["--config", file])


def test_print_config_shows_a_file_that_reads_back_to_the_same(capsys, yaml):
    with pytest.raises(SystemExit) as end:
        config.parse(Outer, ["--inner.rate", "0.25", "--parts", "[x]", "--print_config"])
    assert not end.value.code
    shown = capsys.readouterr().out
    assert config.parse(Outer, ["--config", yaml(shown)]) == Outer(inner=Inner(rate=0.25), parts=["x"])


def test_keys_and_flat_agree():
    assert config.keys(Outer) == list(config.flat(Outer()))
    assert config.flat(Outer())["other.rate"] == 0.5


def explained(kind):
    """(key, the string under it) for every value of a dataclass of dataclasses, read from the source text."""
    body = ast.parse(inspect.getsource(kind)).body[0].body
    below = dict(itertools.pairwise(body))
    for node in body:
        if isinstance(node, ast.AnnAssign):
            part = {f.name: f.type for f in dataclasses.fields(kind)}[node.target.id]
            if dataclasses.is_dataclass(part):
                yield from ((f"{node.target.id}.{key}", text) for key, text in explained(part))
            else:
                after = below.get(node)
                says = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                yield node.target.id, after.value.value if says else ""


def test_help_explains_every_key_of_supervised_fine_tuning(capsys, sft):
    with pytest.raises(SystemExit) as end:
        config.parse(sft, ["--help"])
    assert not end.value.code
    squeeze = lambda text: "".join(text.split())
    shown = squeeze(capsys.readouterr().out)
    found = dict(explained(sft))
    assert list(found) == config.keys(sft)
    for key, text in found.items():
        assert f"--{key}" in shown, key
        assert text, f"{key} has no explanation"
        assert squeeze(text) in shown, f"--help does not explain {key}"


def test_supervised_fine_tuning_names_the_nearest_key_three_levels_down(capsys, sft):
    said = refused(capsys, ["--tuning.lora.rnak", "8"], sft)
    assert "unknown key 'tuning.lora.rnak'; did you mean 'tuning.lora.rank'?" in said


def test_an_unknown_key_of_an_item_of_a_list_is_told_the_nearest_one(tmp_path, capsys):
    from jaxsft.data import Config as Data

    @dataclasses.dataclass(frozen=True)
    class Run:
        data: Data = Data()

    file = tmp_path / "run.yaml"
    file.write_text("data:\n  train:\n    - {path: a.jsonl, wieght: 2}\n")
    with pytest.raises(SystemExit):
        config.parse(Run, ["--config", str(file)])
    assert "unknown key 'wieght'; did you mean 'data.train.weight'?" in capsys.readouterr().err
    file.write_text("data:\n  train:\n    - a.jsonl\n    - {path: b.jsonl, epochs: 2, columns: {text: body}}\n")
    first, second = config.parse(Run, ["--config", str(file)]).data.train
    assert (first, second.epochs, second.columns) == ("a.jsonl", 2.0, {"text": "body"})


@dataclass(frozen=True)
class Find:
    """Find something.

    And more.
    """

    query: str = ""
    """what"""


@dataclass(frozen=True)
class Make:
    """Make something."""

    name: str = "x"
    """how it is called"""


COMMANDS = {"find": Find, "make": Make}


def test_the_first_word_says_which_command():
    assert config.commands(COMMANDS, ["find", "--query", "make"]) == Find("make")
    assert config.commands(COMMANDS, ["make"]) == Make()


@pytest.mark.parametrize("args", [[], ["--help"], ["-h"]])
def test_help_lists_the_commands(capsys, args):
    with pytest.raises(SystemExit) as end:
        config.commands(COMMANDS, args)
    assert end.value.code == 0
    shown = capsys.readouterr().out.splitlines()
    assert "  find       Find something." in shown
    assert "  make       Make something." in shown


def test_help_of_a_command_lists_its_keys(capsys):
    with pytest.raises(SystemExit):
        config.commands(COMMANDS, ["find", "--help"])
    shown = capsys.readouterr().out
    assert re.search(r"usage: \S+ find .*--query", shown, re.DOTALL)
    assert "Find something." in shown


@pytest.mark.parametrize(("word", "said"), [("fnid", "did you mean 'find'? "), ("--query", ""), ("zzz", "")])
def test_an_unknown_command_names_the_nearest(capsys, word, said):
    with pytest.raises(SystemExit) as end:
        config.commands(COMMANDS, [word])
    assert end.value.code == 2
    assert capsys.readouterr().err == f"error: unknown command {word!r}; {said}there are find, make\n"


def test_an_unknown_key_of_a_command_names_the_nearest(capsys):
    with pytest.raises(SystemExit) as end:
        config.commands(COMMANDS, ["find", "--qeury", "x"])
    assert end.value.code == 2
    assert "did you mean 'query'?" in capsys.readouterr().err
