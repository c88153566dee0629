"""A small base model with the shipped tokenizer, a few rows, and two ways to run a script: here or as a process."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest

import jaxsft
from jaxsft import config, hub

ROOT = Path(__file__).parents[2]


def load_script(name: str):
    spec = importlib.util.spec_from_file_location(f"script_{name}", ROOT / "scripts" / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def run_here():
    """run_here("sft", "--key", "value", ...) runs a script's main in this process."""

    def run(name: str, *args: str) -> None:
        script = load_script(name)
        script.main(config.parse(script.Config, list(args)))

    return run


@pytest.fixture(scope="session")
def spawn(tmp_path_factory):
    """spawn("sft", "--key", "value", ...) starts a script as a process of its own, on one CPU device."""
    cache = tmp_path_factory.mktemp("compiled")

    def start(script: str | Path, *args: str, environment: dict[str, str] | None = None) -> subprocess.Popen:
        own = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(cache), "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
        own |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PLATFORMS": "cpu"} | (environment or {})
        file = script if isinstance(script, Path) else ROOT / "scripts" / f"{script}.py"
        command = [sys.executable, str(file), *args]
        return subprocess.Popen(command, env=own, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    return start


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> str:
    """A checkpoint of 2 layers, 32 wide, random weights, the shipped tokenizer."""
    source = tmp_path_factory.mktemp("source")
    for file in Path(jaxsft.BASE).iterdir():
        if file.is_file() and file.suffix in (".json", ".jinja"):
            shutil.copyfile(file, source / file.name)
    raw = json.loads((source / "config.json").read_text())
    raw |= {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "torch_dtype": "float32"}
    raw |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    (source / "config.json").write_text(json.dumps(raw))
    _, params = hub.init(str(source), jax.random.key(0))
    folder = tmp_path_factory.mktemp("small")
    hub.export(str(folder), params, source=str(source))
    return str(folder)


@pytest.fixture(scope="session")
def rows(tmp_path_factory) -> str:
    """Forty rows of questions and answers."""
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    lines = [
        {"instruction": f"What is {a} plus {b}?", "input": "", "output": f"It is {a + b}."}
        for a in range(8)
        for b in range(5)
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return str(file)
