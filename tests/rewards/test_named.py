import sys

import pytest

from jaxsft.rewards.named import REWARDS, RewardError, find

OWN = """
import beside

def plain(prompt, completion, solution, tone="kind", *, strict=False):
    return beside.VALUE

def anything(prompt, answer, /, **columns):
    return len(columns)

def named(prompt, answer, **columns):
    return len(columns)

def trl(completions, answer, **kwargs):
    return [0.0 for _ in completions]

def one(completion):
    return 1

def swapped(completion, solution):
    return 1

class Judge:
    def __call__(self, prompt, completion):
        return 1

instance = Judge()
constant = 3
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "beside.py").write_text("VALUE = 7")
    (tmp_path / "own_rewards.py").write_text(OWN)
    yield tmp_path / "own_rewards.py"
    for name in [name for name in sys.modules if name == "beside" or name.startswith("own_rewards")]:
        del sys.modules[name]


@pytest.mark.parametrize("name", REWARDS)
def test_ours_take_the_prompt_and_the_answer_first_and_are_documented(name):
    found = find(name)
    assert found.manner.never == ["prompt", "completion"]
    assert not found.manner.batch
    doc = REWARDS[name].__doc__ or ""
    assert "Example:" in doc
    assert "Args:" in doc


def test_a_file_is_imported_with_what_stands_beside_it(own):
    found = find(f"{own}:plain", {"tone": "curt"})
    assert found.call("", "", solution="x") == 7
    assert found.manner == (False, ["solution", "strict"], ["solution"], ["prompt", "completion", "tone"])


def test_a_module_is_found_where_python_looks(own, monkeypatch):
    monkeypatch.syspath_prepend(own.parent)
    assert find("own_rewards:plain").call("", "", solution="x") == 7
    assert find("own_rewards:instance").call("", "") == 1


def test_columns_may_have_the_name_of_a_parameter_that_is_positional_alone(own):
    assert find(f"{own}:anything").manner == (False, None, [], [])
    assert find(f"{own}:named").manner == (False, None, [], ["prompt", "answer"])


def test_functions_of_lists_are_told_by_their_parameters(own):
    assert find(f"{own}:trl").manner == (True, None, ["answer"], ["completions"])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("exact_numbr", r"no reward function 'exact_numbr'; did you mean exact_number\?.*regex"),
        ("own.no_such:f", r"no module 'own.no_such'.*A file is named by its path"),
        ("{file}:plane", r"own_rewards.py has no function 'plane'; it has plain, anything, named, trl"),
        ("{file}:constant", r"own_rewards.py has int, not a function, at 'constant'"),
        ("{file}:one", r"takes \(completion\); its first two parameters are the prompt and the model's answer"),
        ("{file}:swapped", r"takes \(completion, solution\); its first two"),
        ("elsewhere.py:f", r"there is no file elsewhere.py \(seen from /"),
    ],
)
def test_a_name_that_means_nothing_is_refused_with_what_there_is(own, name, words):
    with pytest.raises(RewardError, match=words):
        find(name.format(file=own))


def test_an_argument_that_does_not_exist_is_refused_with_those_that_do(own):
    with pytest.raises(RewardError, match=r"regex has no argument 'patern'; it has pattern, whole"):
        find("regex", {"patern": "x"})
    with pytest.raises(RewardError, match=r"no argument 'completion'"):
        find("regex", {"completion": "x"})
