"""Every run file parses with its script, and every script has one that runs on what the project ships."""

import re
from pathlib import Path

import pytest

from jaxsft import config

from .conftest import ROOT, load_script

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
OWN = {
    "sft": "quickstart",
    "pretrain": "pretrain",
    "merge": "merge",
    "chat": "chat",
    "generate": "generate",
    "tokenizer": "tokenizer",
}
OWN |= {"inspect_data": "inspect_data", "dpo": "dpo", "reward": "reward", "ppo": "digits_ppo", "grpo": "digits_grpo"}
OWN |= {"embed": "embed", "classify": "classify", "predict": "predict"}
OWN |= {"compare": "compare", "rag": "harbour_index"}
KINDS = [(script, command) for script in OWN for command in getattr(load_script(script), "COMMANDS", {"": None})]


def kind_of(script: str, command: str | None) -> type:
    module = load_script(script)
    return module.COMMANDS[command] if command else module.Config


@pytest.mark.parametrize("file", CONFIGS, ids=lambda f: f.stem)
def test_a_run_file_names_its_command_and_parses(file):
    text = file.read_text(encoding="utf-8")
    head = re.search(rf"^#   python scripts/(\w+)\.py (?:(\w+) )?--config configs/{file.name}", text, re.MULTILINE)
    assert head, f"{file.name} does not name its command"
    assert re.search(r"^# .*2 CPU cores", text, re.MULTILINE), f"{file.name} does not say the hardware and the time"
    kind = kind_of(head[1], head[2])
    assert config.parse(kind, ["--config", str(file)]) != kind()


@pytest.mark.parametrize("script", sorted(Path(ROOT / "scripts").glob("*.py")), ids=lambda f: f.stem)
def test_every_script_has_a_run_file_that_needs_nothing_else(script):
    text = (ROOT / "configs" / f"{OWN[script.stem]}.yaml").read_text(encoding="utf-8")
    for path in re.findall(r"jaxsft/assets/[\w./]+", text):
        assert (ROOT / path).exists(), path
    assert "base_text" not in text
    assert "shared/" not in text


@pytest.mark.parametrize(("script", "command"), KINDS)
def test_help_explains_every_key(script, command, capsys):
    kind = kind_of(script, command)
    with pytest.raises(SystemExit):
        config.parse(kind, ["--help"])
    shown = capsys.readouterr().out
    for key in config.keys(kind):
        entry = re.search(rf"--{re.escape(key)}\b(.*?)(?=\n  --|\Z)", shown.split("options:")[1], re.DOTALL)
        assert entry, f"{key} is not in --help"
        words = re.sub(r"\(type:.*", "", " ".join(entry[1].split()))
        assert len(re.findall(r"[a-z]{3,}", words)) >= 2, f"{key} has no help: {entry[0]!r}"
