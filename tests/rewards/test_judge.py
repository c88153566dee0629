"""Reward functions in their processes: what they are given, and what becomes of those that fail."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from jaxsft import rewards
from jaxsft.rewards import RewardError, load

OWN = '''
import os, subprocess, sys, time

def wild(prompt, completion, **columns):
    """Does what the answer says."""
    match completion:
        case "raise":
            return {}["key"]
        case "exit":
            sys.exit("bye")
        case "die":
            os._exit(3)
        case "loop":
            while True:
                pass
        case "child":
            subprocess.run([sys.executable, "-c", "import time; time.sleep(77)"])
        case "text":
            return "1.0"
        case "infinite":
            return float("inf")
        case "none":
            return None
        case "nan":
            return float("nan")
        case "true":
            return True
        case "columns":
            return len(columns)
        case "pid":
            return os.getpid()
    return float(completion)

def trl(prompts, completions, answer, completion_ids, **kwargs):
    return [float(c == a and len(prompts) == len(ids) == 2) for c, a, ids in zip(completions, answer, completion_ids)]

async def messages(completions, **kwargs):
    assert kwargs["prompts"][1] == [{"role": "user", "content": "b"}]
    return [2 + float(c[0]["content"]) for c in completions]

def short(completions, **kwargs):
    return [1.0]

def heavy(prompt, completion):
    return float("jax" in sys.modules)

def needs(prompt, completion, solution):
    return 1.0
'''


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    file = tmp_path_factory.mktemp("rewards") / "own.py"
    file.write_text(OWN)
    return file


@pytest.fixture(scope="module")
def wild(own):
    """answers -> Scored, by `wild` at weight 2 and, for what are numbers, `regex` at weight 1."""
    functions = {"wild": {"function": f"{own}:wild", "weight": 2.0}, "regex": {"pattern": "^[0-9]$"}}
    with load(functions, timeout=1.0) as judge:
        yield lambda *answers: judge(["p"] * len(answers), list(answers), [{"n": 1}] * len(answers))


def test_totals_are_weighted_sums_over_the_functions_that_gave_a_reward(wild):
    scored = wild("3", "none", "nan", "true", "columns")
    assert scored.total.dtype == np.float32
    assert scored.total.tolist() == [7.0, 0.0, 0.0, 2.0, 2.0]
    np.testing.assert_array_equal(scored.parts["wild"], [3, np.nan, np.nan, 1, 1])
    assert scored.parts["regex"].tolist() == [1, 0, 0, 0, 0]
    assert scored.failures == []


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        ("raise", "KeyError: 'key' (own.py line 8 in wild)"),
        ("exit", "SystemExit: bye (own.py line 10 in wild)"),
        ("die", "its process ended with status 3"),
        ("loop", "it took more than 1 seconds; raise reward.timeout if it needs them"),
        ("child", "it took more than 1 seconds; raise reward.timeout if it needs them"),
        ("text", "it returned '1.0' (str); expected a number, or None for no reward"),
        ("infinite", "it returned inf (float); expected a number, or None for no reward"),
    ],
)
def test_a_failure_is_told_with_its_answer_and_the_others_have_their_rewards(wild, answer, error):
    scored = wild("1", answer, "2")
    np.testing.assert_array_equal(scored.parts["wild"], [1, np.nan, 2])
    assert scored.failures == [rewards.Failure("wild", "p", answer, error)]
    assert scored.total.tolist() == [3.0, 0.0, 5.0]
    assert rewards.trouble(scored) == ""


def test_a_function_that_takes_process_after_process_with_it_is_given_up_for_the_round(wild):
    scored = wild(*["die"] * 5, "1")
    assert [f.error for f in scored.failures[3:]] == [
        "it was not called: 3 calls before this one took their process with them"
    ] * 3
    assert scored.parts["regex"].tolist() == [0, 0, 0, 0, 0, 1]
    assert wild("1").total.tolist() == [3.0]


def test_what_failed_for_all_is_told_once_for_all(wild):
    told = rewards.trouble(wild("raise", "raise", "text"))
    assert told.startswith("reward function wild failed on all 3 answers, on 2 of them alike: KeyError: 'key' (own.py")
    assert "prompt: p\n" in told


def test_a_process_is_used_again_and_none_is_left(wild, own):
    with load({f"{own}:wild": 1.0}, workers=2) as judge:
        ask = lambda: set(judge(["p"] * 40, ["pid"] * 40, [{}] * 40).total.tolist())
        pids = ask()
        assert ask() <= pids or len(pids) == 1
        judge(["p"], ["1"], [{}])
    for pid in pids:
        assert not alive(int(pid))


def alive(pid: int) -> bool:
    """A process that ended and that nobody has asked for is none."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_functions_of_lists_get_all_answers_in_one_call_with_their_columns(own):
    with load({f"{own}:{name}": 1.0 for name in ("trl", "short", "needs", "heavy")}) as judge:
        fields = [{"answer": "a", "completion_ids": [1, 2]}, {"answer": "b", "completion_ids": [3]}]
        scored = judge(["p", "q"], ["a", "x"], fields)
    parts = dict(zip(("trl", "short", "needs", "heavy"), scored.parts.values(), strict=True))
    assert parts["trl"].tolist() == [1.0, 0.0]
    assert np.isnan([parts["short"], parts["needs"]]).all()
    assert parts["heavy"].tolist() == [0.0, 0.0]  # jax is not there unless the function's module imports it
    errors = {failure.function.rpartition(":")[2]: failure.error for failure in scored.failures}
    assert errors == {
        "short": "it returned 1 rewards for 2 answers; expected one each, None for no reward",
        "needs": "it needs the column solution, and the row has answer, completion_ids; rename it with data columns, "
        "or give it as an argument in reward.functions",
    }


def test_functions_of_lists_may_get_messages(own):
    with load({f"{own}:messages": {"messages": True}}) as judge:
        assert judge(["a", "b"], ["1", "2"], [{}, {}]).total.tolist() == [3.0, 4.0]


def test_no_reward_at_all_is_told():
    with load({"exact_number": 1.0}) as judge:
        scored = judge(["p"], ["4"], [{"text": "4"}])
        assert judge([], [], []).total.shape == (0,)
    assert np.isnan(scored.total).all()
    assert rewards.trouble(scored).startswith("none of the 1 answers has a reward: exact_number gave none")
    failed = scored._replace(failures=[rewards.Failure("f", "p", "a", "KeyError: 'x'")])
    assert rewards.trouble(failed._replace(total=np.full(2, np.nan, np.float32))) == (
        "none of the 2 answers has a reward: some functions failed, 1 times alike: f: KeyError: 'x'\n  prompt: p\n"
        "  answer: a"
    )


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import no_such_package\ndef f(prompt, completion): pass", "ModuleNotFoundError: No module named 'no_such_p"),
        ("def f(prompt, completion: pass", "SyntaxError"),
        ("import os\nos._exit(4)", "the process that imports the reward functions ended with status 4"),
        ("def g(prompt, completion): pass", r"broken.py has no function 'f'; it has g"),
    ],
)
def test_a_module_that_cannot_be_imported_is_an_error_at_once(tmp_path, code, words):
    (tmp_path / "broken.py").write_text(code)
    with pytest.raises(RewardError, match=words):
        load({f"{tmp_path / 'broken.py'}:f": 1.0})


@pytest.mark.parametrize(
    ("functions", "how", "words"),
    [
        ({}, {}, "reward.functions is empty"),
        ({"exact_match": "1"}, {}, "gives exact_match the weight '1'; expected a number"),
        ({"exact_match": float("nan")}, {}, "the weight nan"),
        ({"exact_match": 1.0}, {"timeout": 0.0}, "reward.timeout 0.0; both must be above 0"),
        ({"exact_match": 1.0}, {"workers": 0}, "reward.workers is 0"),
    ],
)
def test_what_cannot_be_is_refused(functions, how, words):
    with pytest.raises(RewardError, match=words):
        load(functions, **how)


SCRIPT = """
import signal
import sys
from jaxsft import rewards
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that runs tests in the background has it ignored
judge = rewards.load({sys.argv[1] + ":wild": 1.0}, timeout=60)
print(int(judge(["p"], ["pid"], [{}]).total[0]), flush=True)
judge(["p"], ["loop"], [{}])
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGKILL"])
def test_a_run_that_ends_in_the_middle_of_a_call_leaves_no_process(own, name):
    import signal

    run = [sys.executable, "-c", SCRIPT, str(own)]
    with subprocess.Popen(run, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout
        pid = int(process.stdout.readline())
        assert alive(pid)
        time.sleep(0.1)
        os.kill(process.pid, getattr(signal, name))
        process.wait(20)
    until = time.monotonic() + 10
    while alive(pid) and time.monotonic() < until:
        time.sleep(0.05)
    assert not alive(pid)
