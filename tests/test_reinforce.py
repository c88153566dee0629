"""The loop around drawing and learning, without a model: what a step is given, when an iteration ends, what is told."""

import dataclasses
import json
import types

import jax
import numpy as np
import pytest

from jaxsft import losses, reinforce, rollouts, sharding
from jaxsft.actor import Asked, Episodes
from jaxsft.objectives import Judged
from jaxsft.reinforce import Charge, Config, Programs, Rules
from jaxsft.rewards import Scored
from jaxsft.run import RunError
from jaxsft.sample import LENGTH, STOP_TOKEN, Samples
from jaxsft.types import Rollouts, State

NAN = float("nan")
MESH = sharding.mesh(2, 1, 1, devices=jax.devices()[:2])


def prompts(longest: int):
    return types.SimpleNamespace(lengths=np.array([3, longest, 2]))


def test_rows_are_as_long_as_the_longest_episode_can_be_or_as_is_said():
    assert reinforce.length_of_rows(Config(), prompts(10), 20, 64) == 32
    assert reinforce.length_of_rows(Config(), prompts(16), 16, 64) == 32
    assert reinforce.length_of_rows(Config(row_length=100), prompts(10), 20, 64) == 100  # positions restart
    assert reinforce.length_of_rows(Config(row_length=30), prompts(10), 20, 64) == 30


def test_an_episode_that_does_not_fit_is_refused_before_it_is_drawn():
    with pytest.raises(
        RunError, match=r"longest prompt has 50 tokens; with 20 new ones .* 64 positions. Lower rollout.max"
    ):
        reinforce.length_of_rows(Config(), prompts(50), 20, 64)
    with pytest.raises(RunError, match=r"train.row_length is 29, and an episode may have 30 tokens; raise it"):
        reinforce.length_of_rows(Config(row_length=29), prompts(10), 20, 64)


def test_answers_are_prompts_times_samples_and_a_step_has_a_share_of_them():
    config = Config(prompts=6, samples=3, minibatches=4, microbatches=2)
    assert (config.answers, config.step.batch_size, config.step.microbatches) == (18, 5, 2)


def drawn(count: int = 12, seed: int = 0) -> Episodes:
    """Answers of 1 to 8 tokens, of which every third is cut."""
    draw = np.random.default_rng(seed)
    lengths = draw.integers(1, 9, count)
    tokens = np.where(np.arange(8) < lengths[:, None], 7, 0).astype(np.int32)
    finish = np.where(np.arange(count) % 3 == 0, LENGTH, STOP_TOKEN)
    samples = Samples(tokens, np.zeros(tokens.shape, np.float32), lengths, finish)
    asked = Asked([[5, 6]] * count, ["ask"] * count, [{}] * count)
    total = np.arange(count, dtype=np.float32)
    total[4] = NAN
    return Episodes(asked, samples, ["say"] * count, Scored(total, {"mine": total}, []), 2.0)


class Recorded:
    """Programs that compute nothing, and note what they were given. A row of `Rollouts` has its own number in it."""

    def __init__(self, drifts=(), weights=()):
        self.scored, self.taken, self.drifts, self.weights = [], [], iter(drifts), iter(weights)
        self.programs = Programs(self.score, self.step, self.take)

    def score(self, variables, tokens, episode, given, silent, kl_coef):
        self.scored.append((variables, np.asarray(given), np.asarray(silent), float(kl_coef)))
        rows = np.arange(len(episode))
        return Judged(Rollouts(*[rows] * 10), np.asarray(given), {"kl_answer": np.float32(3.0)})

    def take(self, rows, chosen, fresh):
        self.taken.append((rows.tokens[chosen].tolist(), bool(fresh)))
        return rows

    def step(self, state, frozen, batch):
        n = len(self.taken)
        told = {"loss": 10.0 * n, "grad_norm": 1.0, "ratio": 1.0 + n, "drift": next(self.drifts, 0.0)}
        return state._replace(step=state.step + 1), told | {"trained_tokens": next(self.weights, 5.0)}


def improved(recorded: Recorded, config: Config, *, charge=Charge(0.1), rules=Rules(), number=1):  # noqa: B008
    episodes = drawn()
    packed = reinforce.pack(episodes, 24, config, MESH)
    state = State(np.int32(0), {"lora": 1}, None, None)
    given = (recorded.programs, state, {"params": 2}, episodes, packed, rules, charge, config, MESH, number)
    return reinforce.improve(*given), episodes, packed


def test_every_epoch_takes_every_row_once_anew_and_only_the_first_step_is_fresh():
    config, seen = Config(epochs=3, minibatches=2, microbatches=2, seed=5), Recorded()
    (state, told), _, packed = improved(seen, config)
    rows = len(packed.episode)
    assert rows % (2 * 2 * MESH.shape["data"]) == 0
    assert int(state.step) == told.figures["updates"] == len(seen.taken) == 6
    assert [fresh for _, fresh in seen.taken] == [True] + [False] * 5
    orders = [seen.taken[i][0] + seen.taken[i + 1][0] for i in (0, 2, 4)]
    assert [sorted(order) for order in orders] == [list(range(rows))] * 3
    assert len({tuple(order) for order in orders}) == 3
    again, other = Recorded(), Recorded()
    improved(again, config)
    improved(other, dataclasses.replace(config, seed=6))
    assert again.taken == seen.taken != other.taken
    later = Recorded()
    improved(later, config, number=2)
    assert later.taken != seen.taken


def test_an_iteration_ends_with_the_epoch_in_which_the_policy_drifted_too_far():
    config, drifts = Config(epochs=4, minibatches=2), [0.0, 0.01, 0.3, 0.02, 0.0, 0.2, 0.0, 0.0]
    seen = Recorded(drifts)
    (_, told), *_ = improved(seen, config, charge=Charge(0.1, stop=0.1))
    assert told.figures["updates"] == len(seen.taken) == 6  # the last minibatch of an epoch counts
    seen = Recorded(drifts)
    improved(seen, config, charge=Charge(0.1, stop=None))
    assert len(seen.taken) == 8


def test_scoring_is_told_rewards_fines_who_is_silent_and_the_coefficient():
    seen = Recorded()
    (_, told), episodes, _ = improved(seen, Config(), charge=Charge(0.25), rules=Rules(penalty=2.0))
    [(variables, given, silent, coef)] = seen.scored
    wanted = [n - 2.0 * (n % 3 == 0) for n in range(12)]
    wanted[4] = NAN
    np.testing.assert_array_equal(given, np.array(wanted, np.float32))
    assert np.flatnonzero(silent).tolist() == [4]
    assert coef == 0.25
    assert variables == {"lora": 1, "params": 2}
    lengths = episodes.samples.lengths
    assert told.figures["trained_tokens"] == lengths.sum() - lengths[4]
    improved(seen, Config(), rules=Rules(silent=True))
    assert np.flatnonzero(seen.scored[1][2]).tolist() == [0, 3, 4, 6, 9]
    improved(seen, Config(), rules=Rules(judged=True))
    assert not seen.scored[2][2].any()
    assert seen.scored[2][1][4] == 0.0


def test_what_is_told_are_means_over_the_steps_that_had_something_to_learn():
    seen = Recorded(weights=[5.0, 0.0, 7.0, 0.0])
    (_, told), episodes, packed = improved(seen, Config(minibatches=2, epochs=2))
    found = told.figures
    assert (found["loss"], found["ratio"]) == (20.0, 3.0)  # of the first and the third
    rewards = np.delete(np.arange(12), 4)
    assert found["reward"] == pytest.approx(rewards.mean())
    assert found["reward_spread"] == pytest.approx(rewards.std())
    assert found["reward_mine"] == pytest.approx(rewards.mean())
    assert found["length"] == pytest.approx(episodes.samples.lengths.mean())
    assert found["ended"] == pytest.approx(8 / 12)
    assert found["kl_answer"] == 3.0
    assert found["rollout_tokens_per_second"] == pytest.approx(episodes.samples.lengths.sum() / 2.0, abs=0.1)
    assert told.tokens == (packed.tokens.segments > 0).sum()
    np.testing.assert_array_equal(told.rewards, episodes.scored.total)


def test_the_coefficient_follows_the_divergence_only_where_there_is_a_target():
    told = reinforce.Told({"kl_answer": 9.0}, np.zeros(4), 0)
    assert reinforce._adapt(Charge(0.2), 0.2, told, 100) == 0.2
    charge = Charge(0.2, target=6.0, horizon=1000)
    assert reinforce._adapt(charge, 0.3, told, 100) == pytest.approx(0.3 * (1 + 0.2 * 100 / 1000))
    less = reinforce.Told({"kl_answer": 5.4}, np.zeros(4), 0)
    wanted = float(losses.adapt(0.3, 5.4, target=6.0, horizon=1000, steps=100))
    assert reinforce._adapt(charge, 0.3, less, 100) == wanted < 0.3


def test_a_minibatch_is_cut_from_the_rows_as_they_lie_on_the_mesh():
    take = reinforce._taker(MESH)
    rows = Rollouts(*(np.arange(8.0)[:, None] + np.zeros((8, 3)) for _ in range(9)), np.zeros((8, 1), bool))
    found = take(rollouts.place(rows, MESH), np.array([6, 1, 0, 3]), True)
    assert found.advantage[:, 0].tolist() == [6.0, 1.0, 0.0, 3.0]
    assert found.advantage.sharding == sharding.tokens(MESH)
    assert found.fresh.all()
    assert not take(rollouts.place(rows, MESH), np.array([6, 1, 0, 3]), False).fresh.any()


def test_people_see_answers_of_the_first_and_the_last_evaluation(tmp_path):
    file = tmp_path / reinforce.SAMPLES
    assert reinforce.before_and_after(tmp_path, 3) == []
    row = lambda step, n, kind="held out": {"step": step, "kind": kind, "prompt": f"p{n}", "answer": f"a{n} at {step}"}
    rows = [row(step, n) | {"wanted": f"w{n}"} for step in (0, 5, 10) for n in range(4)] + [row(10, 9, "drawn")]
    file.write_text("".join(json.dumps(one) + "\n" for one in rows))
    found = reinforce.before_and_after(tmp_path, 2)
    assert found == [("p0", "w0", "a0 at 0", "a0 at 10"), ("p3", "w3", "a3 at 0", "a3 at 10")]
    assert len(reinforce.before_and_after(tmp_path, 9)) == 4
    with file.open("a") as more:  # it went on with other prompts, of which one is the same
        more.write("".join(json.dumps(row(12, n)) + "\n" for n in (3, 7)))
    assert reinforce.before_and_after(tmp_path, 9) == [("p3", "", "a3 at 0", "a3 at 12")]
    assert reinforce.before_and_after(tmp_path, 0) == []
