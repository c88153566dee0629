import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxsft.sample import queue
from jaxsft.sample.queue import pack


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(1, 24), min_size=1, max_size=40), st.integers(1, 9), st.sampled_from([1, 2, 4]))
def test_every_prompt_stands_whole_in_the_piece_that_is_read_when_its_turn_comes(sizes, most, apart):
    prompts = [[100 + number] * size for number, size in enumerate(sizes)]
    found = pack(prompts, width=24, most=most, apart=apart)
    assert found.tokens.shape[1] % apart == 0
    assert len(found.rows) % most == 0
    first = 0
    for piece, until in enumerate(found.until.tolist()):
        assert until - first <= most
        for number in range(first, until):
            here = piece, found.rows[number], slice(found.starts[number], found.starts[number] + found.lengths[number])
            assert found.tokens[here].tolist() == prompts[number]
            assert found.positions[here].tolist() == list(range(sizes[number]))
            assert len(set(found.segments[here].tolist())) == 1
        told = {number - first + 1 for number in range(first, until)}
        assert set(found.segments[piece].ravel().tolist()) - {0} == told
        assert (found.segments[piece] > 0).sum() == sum(sizes[first:until])
        first = until
    assert first == len(prompts)


def test_the_shape_does_not_depend_on_the_lengths_of_prompts():
    draw, shapes = np.random.default_rng(0), set()
    for _ in range(5):
        prompts = [[1] * n for n in draw.integers(1, 97, 50)]
        shapes.add(tuple(x.shape for x in pack(prompts, width=96, most=20)))
    assert len(shapes) == 1


def test_ragged_prompts_take_the_room_of_their_tokens_and_not_of_the_longest():
    sizes = np.random.default_rng(0).integers(8, 129, 200)
    found = pack([[1] * n for n in sizes], width=128, most=200)
    read = int(np.searchsorted(found.until, len(sizes))) + 1  # pieces until the last prompt
    computed = read * found.tokens[0].size
    assert found.tokens[0].size == queue.TOKENS
    assert computed < 1.35 * sizes.sum()
    assert computed < 0.75 * 128 * len(sizes)
