"""The diagram of the architecture is a test: a file imports only lower floors, or its own package."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# A part is a file of jaxsft/ or a package in it; parts of one floor do not know each other.
FLOORS = [
    {"axes", "cache", "tree", "types", "config", "hosts", "run", "report", "narrow", "quant"},
    {"models", "data", "losses", "lora", "sharding", "optim", "preferences", "predictions", "probe", "rewards"}
    | {"augment", "classes", "mistakes"},
    {"hub", "objectives", "sample", "score", "tuning", "checkpoint", "rollouts"},
    {"train", "results", "actor", "voice", "rag"},
    {"session", "sections", "preflight", "reinforce", "talk", "classify"},
]
# Within floor 0 and 1 a few parts are ground for the others.
GROUND = {
    "report": {"run"},
    "types": {"tree"},
    "quant": {"tree", "narrow"},
    "run": {"cache", "hosts"},
    "config": set(),
    "hosts": set(),
}
FLOOR = {part: floor for floor, parts in enumerate(FLOORS) for part in parts}
FILES = sorted((ROOT / "jaxsft").rglob("*.py"))


def part_of(file: Path) -> str:
    return file.relative_to(ROOT / "jaxsft").with_suffix("").parts[0]


def imported_parts(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "jaxsft":
            rest = (node.module or "").split(".")[1:]
            found |= {rest[0]} if rest else {alias.name for alias in node.names}
        if isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("jaxsft.")}
    return found


PARTS = [f for f in FILES if part_of(f) not in ("__init__", "assets")]


@pytest.mark.parametrize("file", PARTS, ids=lambda f: str(f.relative_to(ROOT)))
def test_a_file_imports_only_lower_floors(file):
    here = part_of(file)
    assert here in FLOOR, f"{here} stands on no floor; add it to FLOORS"
    for other in imported_parts(file) - {here}:
        lower = FLOOR[other] < FLOOR[here]
        assert lower or other in GROUND.get(here, set()), f"{file.name} (floor {FLOOR[here]}) imports {other}"


@pytest.mark.parametrize("file", PARTS, ids=lambda f: str(f.relative_to(ROOT)))
def test_flax_lives_in_models_alone_and_nnx_nowhere(file):
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for name in names:
            assert name.split(".")[0] != "flax" or part_of(file) == "models", f"{file.name} imports {name}"
            assert not name.startswith("flax.nnx")
            assert name.split(".")[0] not in ("torch", "pickle"), f"{file.name} imports {name}"


LIGHT = """
import sys
class NoNnx:
    def find_spec(self, name, path=None, target=None):
        if name == "flax.nnx" or name.startswith("flax.nnx."):
            raise ImportError("flax.nnx is broken today")
sys.meta_path.insert(0, NoNnx())
import jaxsft
for name in jaxsft.__all__:
    getattr(jaxsft, name)
heavy = {"transformers", "datasets", "grain", "orbax", "matplotlib", "torch", "pyarrow"} & set(sys.modules)
assert not heavy, heavy
assert "flax.linen" in sys.modules
"""


def test_the_public_names_import_without_nnx_and_without_the_heavy_packages():
    done = subprocess.run([sys.executable, "-W", "error", "-c", LIGHT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_an_unknown_public_name_lists_the_known():
    import jaxsft

    with pytest.raises(AttributeError, match=r"no public name 'laod'.*load"):
        jaxsft.laod  # noqa: B018
    assert sorted(jaxsft.__all__) == jaxsft.__all__ or set(jaxsft.__all__) == {"BASE", *jaxsft._HOME}
