"""What later runs find."""

import os
import subprocess
import sys
from pathlib import Path

from jaxsft import cache

PROGRAM = """
import jax
from jaxsft import run

events = []
jax.monitoring.register_event_listener(lambda name, **more: events.append(name.rpartition("/")[2]))

def main():
    for _ in range(2):
        jax.jit(lambda x: x * 2 + 1)(jax.numpy.ones(3))
        jax.clear_caches()
    print(events.count("cache_hits"), jax.config.jax_compilation_cache_dir)

run.guard(main)
"""


def ask(**environment):
    given = {**os.environ, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", **environment}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=given, capture_output=True, text=True, check=True)
    hits, folder = done.stdout.split()
    return int(hits), folder


def test_a_script_keeps_what_it_compiles(tmp_path):
    hits, folder = ask(JAXSFT_CACHE=str(tmp_path))
    assert hits > 0
    assert Path(folder) == tmp_path / "programs"
    assert list(Path(folder).iterdir())


def test_where_jax_was_told_of_a_folder_that_one_holds(tmp_path):
    _, folder = ask(JAXSFT_CACHE=str(tmp_path / "ours"), JAX_COMPILATION_CACHE_DIR=str(tmp_path / "theirs"))
    assert Path(folder) == tmp_path / "theirs"
    assert not (tmp_path / "ours").exists()


def test_the_environment_names_the_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("JAXSFT_CACHE", str(tmp_path))
    assert cache.folder() == tmp_path
    monkeypatch.delenv("JAXSFT_CACHE")
    assert cache.folder() == Path.home() / ".cache" / "jaxsft"
