"""What becomes of answers: texts, rewards, penalties, and what is told of them. Nothing here is computed by a model."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxsft
from jaxsft import actor, data, hub, rewards, sample
from jaxsft.actor import Asked, Episodes
from jaxsft.rewards import Failure, Scored
from jaxsft.run import RunError
from jaxsft.sample import LENGTH, STOP_STRING, STOP_TOKEN, Samples

NAN = float("nan")
FINISH = [STOP_TOKEN, STOP_STRING, LENGTH, STOP_TOKEN]


def episodes(total, parts=None, failures=(), finish=FINISH, fields=None) -> Episodes:
    """Answers of 1, 2, ... tokens to as many prompts, judged."""
    count = len(total)
    asked = Asked([[5, 6]] * count, [f"ask {i}" for i in range(count)], fields or [{} for _ in range(count)])
    lengths = np.arange(count) + 1
    tokens = np.where(np.arange(count) < lengths[:, None], 7, 0).astype(np.int32)
    samples = Samples(tokens, np.zeros(tokens.shape, np.float32), lengths, np.array(finish[:count]))
    as_array = lambda x: np.array(x, np.float32)
    given = {name: as_array(part) for name, part in (parts or {"mine": total}).items()}
    return Episodes(
        asked, samples, [f"say {i}" for i in range(count)], Scored(as_array(total), given, list(failures)), 1.0
    )


def test_a_batch_that_empty_rows_fill_begins_anew():
    assert actor.taken(np.array([4, 2, 7])) == [4, 2, 7]
    assert actor.taken(np.array([3, -1, -1, -1])) == [3, 3, 3, 3]
    assert actor.taken(np.array([4, 2, -1, -1, -1])) == [4, 2, 4, 2, 4]


def test_only_answers_that_nothing_ended_are_fined():
    """Neither a stop token, whichever of several, nor a stop string is a missing end."""
    found = episodes([1.0, 2.0, 3.0, NAN])
    assert actor.given(found, penalty=0.5, judged=False).tolist()[:3] == [1.0, 2.0, 2.5]
    assert np.isnan(actor.given(found, penalty=0.5, judged=False)[3])  # a fine is no reward
    assert actor.given(found, penalty=None, judged=False).tolist()[:3] == [1.0, 2.0, 3.0]
    assert found.ended.tolist() == [True, True, False, True]
    assert found.scored.total[2] == 3.0  # and nothing was written to


def test_beside_a_reward_model_an_answer_without_a_reward_of_functions_has_that_one_s_alone():
    assert actor.given(episodes([1.0, NAN]), penalty=None, judged=True).tolist() == [1.0, 0.0]
    assert actor.given(episodes([NAN, NAN, NAN]), penalty=1.0, judged=True).tolist() == [0.0, 0.0, -1.0]


def test_where_every_reward_failed_the_prompt_and_the_error_are_named():
    failures = [Failure("mine", f"ask {i}", f"say {i}", "KeyError: 'x' (mine.py line 3 in f)") for i in range(2)]
    with pytest.raises(
        RunError, match=r"mine failed on all 2 answers, .*: KeyError: 'x' \(mine.py line 3 .*\n.*ask 0"
    ) as error:
        actor.given(episodes([NAN, NAN], failures=failures), penalty=None, judged=False)
    assert "say 0" in str(error.value)
    with pytest.raises(RunError, match=r"none of the 2 answers has a reward: mine gave none"):
        actor.given(episodes([NAN, NAN]), penalty=None, judged=False)


def test_figures_are_means_over_the_answers_that_have_them():
    failures = [Failure("other", "ask 3", "say 3", "it took more than 10 seconds")]
    found = episodes(
        [1.0, 2.0, 3.0, NAN], {"mine": [1, 2, 3, NAN], "other": [NAN, 4, NAN, NAN], "none": [NAN] * 4}, failures
    )
    wanted = {"reward_mine": 2.0, "reward_other": 4.0, "length": 2.5, "ended": 0.75, "failures": 1}
    assert actor.figures(found) == wanted


def test_lines_are_json_with_none_where_there_is_no_reward():
    fields = [{"answer": 12}, {"other": "x"}, {}]
    found = episodes([1.0, NAN, 0.25], fields=fields)
    rows = actor.lines(found, np.array([0.5, NAN, 1 / 3]))
    assert rows == json.loads(json.dumps(rows, allow_nan=False))
    assert rows[0] == {
        "prompt": "ask 0", "answer": "say 0", "reward": 0.5, "reward_mine": 1.0, "ended": True, "wanted": "12",
    }  # fmt: skip
    assert rows[1]["reward"] is rows[1]["reward_mine"] is None
    assert "wanted" not in rows[1]
    assert [row["ended"] for row in rows] == [True, True, False]


def test_every_failure_is_told_with_prompt_answer_and_error():
    failures = [Failure("mine", "ask 1", "say 1", "ValueError: no")]
    told = actor.failed(episodes([1.0, NAN], failures=failures))
    assert told == [{"function": "mine", "prompt": "ask 1", "answer": "say 1", "error": "ValueError: no"}]


@pytest.fixture(scope="module")
def tokenizer():
    return hub.load_tokenizer(jaxsft.BASE)


def test_functions_see_the_text_before_the_end_and_the_row_and_tokens_keep_the_end(tokenizer, monkeypatch):
    ids = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]
    end = tokenizer.eos_token_id
    drawn = [[*ids("one two"), end], [*ids("one END two")], ids("one"), ids("two")]
    width = max(map(len, drawn))
    found = Samples(
        np.array([row + [0] * (width - len(row)) for row in drawn], np.int32),
        np.zeros((4, width), np.float32),
        np.array([len(row) for row in drawn]),
        np.array([STOP_TOKEN, STOP_STRING, LENGTH, LENGTH]),
    )
    calls, seen = [], []

    def generate(model, variables, prompts, **how):
        calls.append((variables, prompts, how))
        return found

    def judge(prompts, answers, fields):
        seen.append((prompts, answers, fields))
        return Scored(np.arange(4, dtype=np.float32), {}, [])

    monkeypatch.setattr(sample, "generate", generate)
    how = sample.Config(max_new_tokens=9, temperature=0.5, stop=["END"])
    act = actor.act(None, tokenizer, [end, 77], how, judge)
    asked = Asked([[5], [6, 7]], ["p", "q"], [{"answer": "1"}, {"answer": "2"}])
    got = act({"params": 1}, asked, samples=2, key=jax.random.key(0))
    [(variables, prompts, given)], [(texts, answers, fields)] = calls, seen
    assert (variables, prompts, given["samples"], given["max_new_tokens"]) == ({"params": 1}, [[5], [6, 7]], 2, 9)
    assert (given["draw"], given["stop"], given["strings"].strings) == (how.draw, [end, 77], ("END",))
    assert texts == got.asked.texts == ["p", "p", "q", "q"]
    assert answers == got.answers == ["one two", "one ", "one", "two"]
    assert fields == [
        {"answer": answer, "completion_ids": ids}
        for answer, ids in zip("1122", [drawn[0][:-1], *drawn[1:]], strict=True)
    ]
    assert got.tokens == drawn
    assert got.asked.ids == [[5], [5], [6, 7], [6, 7]]
    assert got.ended.tolist() == [True, True, False, False]


def test_prompts_come_by_number_with_what_was_asked_last_and_the_row_s_other_columns(tokenizer, tmp_path):
    file = Path(tmp_path) / "rows.jsonl"
    rows = [{"prompt": f"What is {n} and {n}?", "answer": str(2 * n)} for n in range(5)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    loaded = data.load_prompts(data.Config(train=str(file), max_length=64), tokenizer).train
    asked = actor.ask(loaded, [3, 1, 3], tokenizer)
    where = [next(i for i in range(5) if f"What is {i} " in text) for text in asked.texts]
    assert where[0] == where[2] != where[1]
    for number, text, ids, fields in zip(where, asked.texts, asked.ids, asked.fields, strict=True):
        assert text.strip() == rows[number]["prompt"]
        assert text in tokenizer.decode(ids)
        assert fields["answer"] == rows[number]["answer"]


class Held:
    """Two held-out prompts."""

    documents = (0, 1)

    def __len__(self) -> int:
        return 2

    def document(self, number: int) -> data.Example:
        return data.Example(np.array([5 + number]), np.zeros(1, bool))

    def fields(self, row: int) -> dict:
        return {"answer": str(row)}


@pytest.mark.parametrize("judged", [False, True])
def test_an_examination_draws_alike_every_time_and_adds_the_reward_model_s_score(tokenizer, judged):
    keys, scored = [], []

    def act(policy, asked, *, samples, key):
        keys.append((asked.ids, samples, jax.random.key_data(key).tolist()))
        return episodes([1.0, NAN])

    def score(texts):
        scored.append(texts)
        return [0.5, -1.0]

    more = {"score": score, "weight": 2.0} if judged else {}
    examine = actor.examination(act, Held(), tokenizer, seed=3, **more)
    found = examine({}), examine({})
    assert keys[0] == keys[1] == ([[5], [6]], 1, jax.random.key_data(jax.random.key(3)).tolist())
    if judged:
        assert scored[0] == [[5, 7], [6, 7, 7]]  # prompt and answer
        assert found[0].scored.total.tolist() == [2.0, -2.0]
        assert found[0].scored.parts["model"].tolist() == [0.5, -1.0]
    else:
        assert found[0].scored.total[0] == 1.0
    assert actor.examination(act, None, tokenizer, seed=3) is None


def test_an_examination_without_any_reward_is_refused(tokenizer):
    act = lambda *args, **kwargs: episodes([NAN, NAN])
    with pytest.raises(RunError, match="none of the 2 answers has a reward"):
        actor.examination(act, Held(), tokenizer, seed=0)({})


def test_judges_of_rewards_are_what_act_expects():
    with rewards.load({}, required=False) as judge:
        scored = judge(["a"], ["b"], [{}])
    assert np.isnan(scored.total).all()
    assert actor.given(episodes([NAN])._replace(scored=scored), penalty=None, judged=True).tolist() == [0.0]
