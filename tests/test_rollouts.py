"""Packed episodes against plain loops over the episodes themselves."""

import jax
import numpy as np
import pytest

from jaxsft import losses, rollouts, sharding


def drawn(count: int, seed: int = 0, longest: int = 12) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts of 1 to 5 tokens, answers of 1 to what is left of `longest`; every token is another number."""
    draw, number = np.random.default_rng(seed), iter(range(1, 10_000))
    take = lambda size: [next(number) for _ in range(size)]
    prompts = [take(draw.integers(1, 6)) for _ in range(count)]
    return prompts, [take(draw.integers(1, longest + 1 - len(prompt))) for prompt in prompts]


@pytest.mark.parametrize(("count", "length", "unit"), [(1, 12, 1), (7, 12, 4), (40, 30, 6), (40, 400, 2)])
def test_every_episode_stands_in_one_row_once_with_its_answer_learned(count, length, unit):
    prompts, answers = drawn(count)
    tokens, episode = rollouts.pack(prompts, answers, length=length, unit=unit)
    assert len(episode) % unit == 0
    assert all(part.shape == (len(episode), length) for part in tokens)
    for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        [row] = set(np.nonzero(episode == number)[0].tolist())
        where = np.flatnonzero(episode[row] == number)
        assert where.tolist() == list(range(where[0], where[0] + len(prompt) + len(answer)))
        assert tokens.tokens[row, where].tolist() == [*prompt, *answer]
        assert tokens.mask[row, where].tolist() == [False] * len(prompt) + [True] * len(answer)
        assert tokens.positions[row, where].tolist() == list(range(len(where)))
        assert len(set(tokens.segments[row, where].tolist())) == 1
    nobody = episode == count
    assert (nobody == (tokens.segments == 0)).all()
    assert not tokens.mask[nobody].any()
    for row in range(len(episode)):  # no two episodes of a row have one segment
        pairs = set(zip(tokens.segments[row].tolist(), episode[row].tolist(), strict=True))
        assert len({segment for segment, _ in pairs}) == len(pairs)


def test_where_tokens_are_predicted_episodes_are_apart_and_an_answers_last_token_is_its_last_position():
    prompts, answers = drawn(20)
    tokens, episode = rollouts.pack(prompts, answers, length=25)
    targets, learned = (
        np.asarray(x) for x in losses.shift(*map(np.asarray, (tokens.tokens, tokens.mask, tokens.segments)))
    )
    ends = np.asarray(losses.last(learned))
    assert learned.sum() == sum(map(len, answers))
    for number, answer in enumerate(answers):
        own = (episode == number) & learned
        assert targets[own].tolist() == answer
        assert targets[own & ends].tolist() == answer[-1:]
    assert ends.sum() == len(answers)


def test_an_episode_without_an_answer_takes_no_room_and_keeps_its_number():
    tokens, episode = rollouts.pack([[5, 6], [7], [8]], [[1], [], [2, 3]], length=8)
    assert np.unique(episode).tolist() == [0, 2, 3]
    assert (tokens.segments > 0).sum() == 6
    empty, nobody = rollouts.pack([[5, 6]], [[]], length=8, unit=2)
    assert not empty.segments.any()
    assert (nobody == 1).all()


def test_an_episode_longer_than_a_row_is_refused():
    with pytest.raises(ValueError, match="9"):
        rollouts.pack([[1, 2, 3]], [[4, 5, 6, 7, 8, 9]], length=8)


def test_the_number_of_rows_is_one_of_few_and_at_most_half_too_many():
    for unit in (1, 3, 8):
        found = [rollouts.ladder(rows, unit) for rows in range(1, 200)]
        assert len({n // unit for n in found}) <= 2 * np.log2(200 / unit) + 2
        for rows, n in enumerate(found, 1):
            assert n % unit == 0
            assert rows <= n < max(1.5 * (rows + unit), unit + 1)
        assert found == sorted(found)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_minibatches_share_out_all_rows_anew_and_none_is_empty(count):
    prompts, answers = drawn(40)
    packed = rollouts.pack(prompts, answers, length=60, unit=4)
    used = (packed.tokens.segments > 0).any(axis=1)
    assert 0 < used.sum() < len(used)  # some rows are empty
    orders = set()
    for seed in range(20):
        found = rollouts.minibatches(np.random.default_rng(seed), packed, count)
        assert found.shape == (count, len(used) // count)
        assert sorted(found.ravel().tolist()) == list(range(len(used)))
        share = used[found].sum(axis=1)
        assert share.max() - share.min() <= 1
        orders.add(tuple(found.ravel().tolist()))
    assert len(orders) > 15


def test_placed_rows_lie_over_the_mesh_as_a_batch_does():
    mesh = sharding.mesh(2, 2, 1, 2)
    packed = rollouts.pack(*drawn(40), length=60, unit=4)
    placed = rollouts.place(packed, mesh)
    for ours, theirs in zip(jax.tree.leaves(placed), jax.tree.leaves(packed), strict=True):
        assert ours.sharding == sharding.tokens(mesh)
        np.testing.assert_array_equal(ours, theirs)
