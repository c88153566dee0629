"""What the pages of docs/ show is what the code does."""

import doctest
import json
import re
from pathlib import Path

import pytest

import jaxsft
from jaxsft import config, data, hub, losses, models, rewards
from jaxsft.data.render import encode
from jaxsft.data.script import scripts

from .parity import model_table

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PREFERENCE = DOCS / "preference.md"
PAGE = DOCS / "data.md"
BLOCK = re.compile(r"```json\n(.*?)\n```\n\n```text\n(.*?)\n```", re.DOTALL)
BLOCKS = BLOCK.findall(PAGE.read_text(encoding="utf-8"))


def shown(row: str) -> str:
    """A row's tokens, parted by spaces, what is learned in brackets; the two answers of a preference on lines."""
    tokenizer = data.with_template(hub.load_tokenizer(jaxsft.BASE), "chatml")
    _, parsed = data.parse(json.loads(row))
    lines = []
    for ids, mask, _ in encode(scripts(parsed, tokenizer), tokenizer):
        line, inside = [], False
        for token, learned in zip(ids.tolist(), mask.tolist(), strict=True):
            piece = tokenizer.decode([token]).replace("\n", "↵").replace(" ", "␣")
            line.append("⟧ " * (inside and not learned) + " " * (not inside or learned) * bool(line))
            line[-1] = line[-1].replace("  ", " ") + "⟦" * (learned and not inside) + piece
            inside = learned
        lines.append("".join(line) + "⟧" * inside)
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("row", "text"), BLOCKS, ids=[json.loads(row).keys().__iter__().__next__() for row, _ in BLOCKS]
)
def test_a_row_of_the_page_is_rendered_as_it_says(row, text):
    assert shown(row) == text


def test_the_page_shows_a_row_of_every_format():
    page = PAGE.read_text(encoding="utf-8")
    assert [name for name in data.FORMATS if f"### {name}\n" not in page] == []
    told = {data.detect(json.loads(row)) for row, _ in BLOCKS}
    assert told == set(data.FORMATS) - {"image"}


def test_the_page_of_preferences_lists_every_loss():
    page = PREFERENCE.read_text(encoding="utf-8")
    assert [name for name in [*losses.PREFERENCE, *losses.UNPAIRED] if f"`{name}`" not in page] == []


def test_the_page_of_policies_lists_every_loss_type_as_it_is():
    page = (DOCS / "policy.md").read_text(encoding="utf-8")
    rows = [f"| `{name}` | `{made.policy}` | `{made.aggregate}` |" for name, made in losses.LOSS_TYPES.items()]
    rows += [f"| `{name}` |" for name in [*losses.POLICY, *losses.AGGREGATES]]
    assert [row for row in rows if f"\n{row}" not in page] == []


def test_the_page_of_rewards_runs_as_it_says(tmp_path, monkeypatch):
    page = (DOCS / "rewards.md").read_text(encoding="utf-8")
    assert [name for name in rewards.REWARDS if f"\n| `{name}` |" not in page] == []
    own, settings = (re.search(rf"```{kind}\n(.*?)```", page, re.DOTALL) for kind in ("python", "yaml"))
    command = re.search(r"--reward.functions '(.*?)'", page)
    assert own
    assert settings
    assert command
    monkeypatch.chdir(tmp_path)
    Path("my_rewards.py").write_text(own[1])
    assert doctest.testfile(str(DOCS / "rewards.md"), module_relative=False) == (0, 6)

    Path("run.yaml").write_text(settings[1].replace("reward:\n", "", 1).replace("\n  ", "\n").removeprefix("  "))
    read = config.parse(rewards.Config, ["--config", "run.yaml"])
    typed = config.parse(rewards.Config, ["--functions", command[1]])
    assert typed.functions == {"my_rewards.py:polite": 0.2, "my_rewards.py:near": {"tolerance": 0.5}}
    named = {name: value for name, value in read.functions.items() if "my_package" not in name}
    for functions in (named, typed.functions):
        with rewards.load(functions, timeout=read.timeout, workers=read.workers) as judge:
            assert judge(["6 x 7?"], ["42"], [{"answer": 42, "solution": 42}]).failures == []


def test_the_page_of_models_is_the_registry_with_errors_that_were_measured():
    page = (DOCS / "models.md").read_text(encoding="utf-8")
    errors = model_table.measured(page)
    assert set(errors) == set(models.FAMILIES)
    assert model_table.BEGIN + model_table.table(errors) + model_table.END in page
    for family, (error, configurations) in errors.items():
        assert 0 < error < 1e-4, family
        assert configurations >= 3, family


def test_the_page_of_models_has_the_families_of_images_with_errors_that_were_measured():
    page = (DOCS / "models.md").read_text(encoding="utf-8")
    errors = model_table.measured(page, model_table.IMAGES)
    assert set(errors) == set(models.VISION)
    assert model_table.IMAGES + model_table.image_table(errors) + model_table.END in page
    assert all(0 < error < 1e-4 for error, _ in errors.values())


def test_the_family_that_the_page_shows_is_the_one_there_is():
    page = (DOCS / "add_a_model.md").read_text(encoding="utf-8")
    shown = re.search(r"```python\n(.*?)```", page, re.DOTALL)
    assert shown
    assert shown[1] == (ROOT / "jaxsft" / "models" / "olmo2.py").read_text(encoding="utf-8")
