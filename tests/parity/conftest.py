"""Shared pairs of models, and a table of the largest differences found at the end of the run.

Nothing here is imported unless `-m parity` asks for it: torch, transformers and PEFT take seconds to import, and the
default suite must pass without them.
"""

import numpy as np
import pytest

SEEN = pytest.StashKey[dict[str, tuple[float, str]]]()


def pytest_ignore_collect(collection_path, config):
    """Leaves this folder alone in runs that deselect it anyway; None lets pytest decide."""
    return True if "not parity" in config.option.markexpr else None


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    """name -> Pair, each made once."""
    from .pairs import make

    made = {}

    def get(name: str):
        if name not in made:
            made[name] = make(name, tmp_path_factory.mktemp(name))
        return made[name]

    return get


@pytest.fixture
def pair(request, pairs):
    """The pair of an indirect parameter."""
    return pairs(request.param)


@pytest.fixture
def difference(request):
    """(what, ours, theirs) -> largest absolute difference, remembered for the table at the end."""
    seen = request.config.stash.setdefault(SEEN, {})

    def measure(what: str, ours, theirs, *, relative: bool = False) -> float:
        ours, theirs = (np.asarray(x, np.float64) for x in (ours, theirs))
        assert ours.shape == theirs.shape
        value = float(np.abs(ours - theirs).max())
        if relative:
            value /= max(float(np.abs(theirs).max()), 1e-30)
        seen[what] = max(seen.get(what, (0.0, "")), (value, request.node.name))
        return value

    return measure


def pytest_terminal_summary(terminalreporter, config):
    if seen := config.stash.get(SEEN, None):
        terminalreporter.section("largest differences from the reference")
        for what, (value, where) in sorted(seen.items()):
            terminalreporter.write_line(f"{value:9.2e}  {what:60}  {where}")
