import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsft.losses import mask_tokens

MASK, ORDINARY = 3, np.arange(5, 40)
CONTINUES = np.isin(np.arange(40), range(30, 40))  # ids 30 to 39 are ##pieces
hide = functools.partial(mask_tokens, mask_id=MASK, ordinary=jnp.asarray(ORDINARY))


@pytest.fixture(scope="module")
def rows():
    """tokens [64, 500], a few of them special; and the mask of those that may be chosen."""
    draw = np.random.default_rng(0)
    tokens = draw.integers(5, 40, (64, 500)).astype(np.int32)
    tokens[:, ::50] = 1
    return tokens, tokens >= 5


def near(count, of, share):
    """Within five standard deviations of a binomial."""
    return abs(count - share * of) < 5 * np.sqrt(of * share * (1 - share))


@pytest.mark.parametrize("rate", [0.15, 0.4])
@pytest.mark.parametrize("continues", [None, CONTINUES], ids=["tokens", "words"])
def test_the_share_that_is_chosen_and_the_ways_it_is_hidden_are_as_told(rows, rate, continues):
    tokens, candidates = rows
    given = None if continues is None else jnp.asarray(continues)
    corrupted, chosen = map(np.asarray, hide(jax.random.key(0), tokens, candidates, rate=rate, continues=given))
    n = chosen.sum()
    words = candidates.sum() if continues is None else (candidates & ~CONTINUES[tokens]).sum()
    assert near(n * words / candidates.sum(), words, rate)
    masked, kept = corrupted[chosen] == MASK, corrupted[chosen] == tokens[chosen]
    assert near(masked.sum(), n, 0.8)
    assert near(kept.sum(), n, 0.1 + 0.1 / len(ORDINARY))  # another token may be the same one
    others = corrupted[chosen][~masked & ~kept]
    assert set(others.tolist()) == set(ORDINARY.tolist())
    counts = np.bincount(others, minlength=40)[5:]
    assert all(near(count, len(others), 1 / len(ORDINARY)) for count in counts)


def test_what_is_not_chosen_stays_and_what_is_no_candidate_is_never_chosen(rows):
    tokens, candidates = rows
    corrupted, chosen = map(np.asarray, hide(jax.random.key(1), tokens, candidates, rate=0.9))
    np.testing.assert_array_equal(corrupted[~chosen], tokens[~chosen])
    assert not (chosen & ~candidates).any()
    assert chosen[candidates].any()
    corrupted, chosen = hide(jax.random.key(1), tokens, np.zeros_like(candidates))
    assert not chosen.any()
    np.testing.assert_array_equal(corrupted, tokens)


def test_a_word_is_chosen_with_all_its_tokens_or_not_at_all(rows):
    tokens, candidates = rows
    _, chosen = hide(jax.random.key(2), tokens, candidates, rate=0.3, continues=jnp.asarray(CONTINUES))
    fates, sizes = [], []
    for row, may, hit in zip(tokens.tolist(), candidates.tolist(), np.asarray(chosen).tolist(), strict=True):
        for i, token in enumerate(row):
            if not may[i]:
                continue
            if CONTINUES[token] and i and may[i - 1]:  # a piece behind a special token begins a word
                fates[-1].append(hit[i])
            else:
                fates.append([hit[i]])
    assert all(len(set(word)) == 1 for word in fates)
    sizes = [len(word) for word in fates]
    assert max(sizes) > 3
    assert near(sum(word[0] for word in fates), len(fates), 0.3)


def test_a_draw_follows_its_key_alone_and_rows_are_drawn_apart(rows):
    tokens, candidates = rows
    draw = jax.jit(functools.partial(hide, continues=jnp.asarray(CONTINUES)))
    first, again = draw(jax.random.key(3), tokens, candidates), draw(jax.random.key(3), tokens, candidates)
    np.testing.assert_array_equal(first[0], again[0])
    other = draw(jax.random.key(4), tokens, candidates)
    assert (np.asarray(first[1]) != np.asarray(other[1])).any(axis=1).all()
    alike = np.tile(tokens[:1], (2, 1)), np.tile(candidates[:1], (2, 1))
    assert (np.diff(np.asarray(hide(jax.random.key(5), *alike)[1]).astype(int), axis=0) != 0).any()
    single = hide(jax.random.key(6), tokens[0], candidates[0])  # a row without a batch around it
    assert single[0].shape == tokens[0].shape
