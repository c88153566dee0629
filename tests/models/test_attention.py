import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsft.models.attention import NO_WINDOW, Where, blocks, plain, visible
from jaxsft.models.attention.blocks import How, _met
from jaxsft.models.remat import POLICIES


def where(*rows):
    """Rows given as the lengths of their documents, a negative one for padding -> Where."""
    width = sum(map(abs, rows[0]))
    positions, segments = np.zeros((2, len(rows), width), np.int32)
    for i, row in enumerate(rows):
        start = 0
        for number, length in enumerate(row, 1):
            here = slice(start, start + abs(length))
            positions[i, here] = np.arange(abs(length)) if length > 0 else 0
            segments[i, here] = number if length > 0 else 0
            start += abs(length)
    return Where(jnp.asarray(positions), jnp.asarray(segments))


def pairs(*rows):
    """Rows given as lengths of (prompt, chosen, rejected), answers with the prompt's last token -> Where with reads."""
    made = []
    for row in rows:
        cells = []
        for k, (prompt, *answers) in enumerate(row):
            cells += [(at, 3 * k + 1, 3 * k + 1) for at in range(prompt)]
            for side, answer in enumerate(answers):
                cells += [(prompt + at, 3 * k + 2 + side, 3 * k + 1) for at in range(answer)]
        made.append(cells)
    width = max(map(len, made)) + 2
    arrays = np.array([cells + [(0, 0, 0)] * (width - len(cells)) for cells in made], np.int32)
    return Where(*jnp.moveaxis(jnp.asarray(arrays), 2, 0))


def seen(query, key, window):
    """visible() by a triple loop over Python numbers."""
    qp, qs, kp, ks = (np.asarray(x).tolist() for x in (*query[:2], *key[:2]))
    read = qs if query.reads is None else query.reads.tolist()
    found = np.zeros((len(qp), len(qp[0]), len(kp[0])), bool)
    for b, t, s in np.ndindex(found.shape):
        same, past = ks[b][s] in (qs[b][t], read[b][t]), kp[b][s] <= qp[b][t]
        found[b, t, s] = same and past and qp[b][t] - kp[b][s] < window
    return found


def heads(seed, T, N, S=None, K=None, H=4, B=2):
    draw = np.random.default_rng(seed)
    shapes = [(B, T, N, H), (B, S or T, K or N, H), (B, S or T, K or N, H)]
    return [jnp.asarray(draw.normal(size=shape), jnp.float32) for shape in shapes]


def loop(q, k, v, mask):
    """Softmax attention, a query at a time, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out, group = np.zeros_like(q), q.shape[2] // k.shape[2]
    for b, t, n in np.ndindex(q.shape[:3]):
        keys = np.flatnonzero(mask[b, t])
        scores = k[b, keys, n // group] @ q[b, t, n] / np.sqrt(q.shape[3])
        weights = np.exp(scores - scores.max())
        out[b, t, n] = (weights / weights.sum()) @ v[b, keys, n // group]
    return out


ROWS = where([3, 4, -2], [1, 2, 6])
BRANCHES = pairs([(3, 2, 4), (0, 1, 3)], [(1, 5, 1), (4, 2, 2)])
jit = functools.partial(jax.jit, static_argnames=("causal", "scale", "soft_cap", "tile"))
at_once = jit(lambda q, k, v, where, *window, **how: plain(q, k, v, where, where, *window, **how))
in_blocks = jit(functools.partial(blocks, tile=64))
FORMS = [at_once, in_blocks]


@pytest.mark.parametrize("window", [1, 2, 3, NO_WINDOW])
@pytest.mark.parametrize("rows", [ROWS, BRANCHES], ids=["documents", "pairs"])
def test_visible_equals_a_triple_loop(rows, window):
    np.testing.assert_array_equal(visible(rows, rows, window), seen(rows, rows, window))


def test_an_answer_sees_its_prompt_as_in_its_own_document_and_not_the_other_answer():
    sees = np.asarray(visible(BRANCHES, BRANCHES))[0, :, :15].astype(int)
    assert sees[4].tolist() == [1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]  # the second token of chosen
    assert sees[6].tolist() == [1, 1, 1, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0]  # the second token of rejected
    assert sees[11].tolist() == [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 0, 0, 0]  # of the next pair, which has no prompt


@pytest.mark.parametrize("window", [2, NO_WINDOW])
def test_visible_between_queries_and_a_longer_cache_equals_a_triple_loop(window):
    query = Where(jnp.array([[4], [7]]), jnp.array([[1], [1]]))
    slots = Where(jnp.tile(jnp.arange(9), (2, 1)), jnp.ones((2, 9), jnp.int32))
    np.testing.assert_array_equal(visible(query, slots, window), seen(query, slots, window))


def both_sides(query, key):
    """visible() of an encoder, by a triple loop."""
    qs, ks = (np.asarray(x.segments).tolist() for x in (query, key))
    return np.array([[[a == b for b in there] for a in here] for here, there in zip(qs, ks, strict=True)])


def test_what_is_not_causal_sees_its_whole_document_and_no_other():
    np.testing.assert_array_equal(visible(ROWS, ROWS, causal=False), both_sides(ROWS, ROWS))
    np.testing.assert_array_equal(visible(ROWS, ROWS, 2, causal=False), both_sides(ROWS, ROWS))


@pytest.mark.parametrize("rows", [ROWS, where([300], [100, 150, 30, -20])], ids=["one block", "several"])
def test_attention_to_both_sides_equals_the_plain_loop_in_both_forms(rows):
    q, k, v = heads(2, rows.positions.shape[1], 2)
    expected, real = loop(q, k, v, both_sides(rows, rows)), np.asarray(rows.segments) > 0
    for attend in FORMS:
        np.testing.assert_allclose(attend(q, k, v, rows, causal=False)[real], expected[real], atol=5e-6)


def test_a_token_sees_itself_even_where_it_is_padding():
    assert np.asarray(visible(ROWS, ROWS, 1)).diagonal(axis1=1, axis2=2).all()


@pytest.mark.parametrize("window", [3, NO_WINDOW])
@pytest.mark.parametrize(("n", "kv"), [(4, 4), (4, 2), (3, 1)])
def test_attend_equals_a_plain_softmax_loop_in_both_forms(n, kv, window):
    q, k, v = heads(n + kv, 9, n, K=kv)
    expected = loop(q, k, v, seen(ROWS, ROWS, window))
    for attend in FORMS:
        np.testing.assert_allclose(attend(q, k, v, ROWS, window), expected, atol=2e-6)


@pytest.mark.parametrize(("scale", "soft_cap"), [(0.7, None), (None, 1.5), (0.3, 0.8)])
def test_scores_are_scaled_and_capped_as_told(scale, soft_cap):
    q, k, v = heads(5, 9, 2)
    sees = np.asarray(seen(ROWS, ROWS, NO_WINDOW))
    expected = np.zeros(q.shape, np.float32)
    for b, t, n in np.ndindex(*q.shape[:3]):
        there = np.flatnonzero(sees[b, t])
        scores = np.asarray(k[b, there, n] @ q[b, t, n]) * (q.shape[-1] ** -0.5 if scale is None else scale)
        scores = scores if soft_cap is None else soft_cap * np.tanh(scores / soft_cap)
        weights = np.exp(scores - scores.max())
        expected[b, t, n] = weights @ np.asarray(v[b, there, n]) / weights.sum()
    for attend in FORMS:
        np.testing.assert_allclose(attend(q, k, v, ROWS, scale=scale, soft_cap=soft_cap), expected, atol=2e-6)


LONG = {"documents": where([300], [100, 150, 30, -20]), "pairs": pairs([(150, 60, 88)], [(20, 30, 40), (130, 9, 50)])}


def pulled(attend, rows, seed=0, **how):
    """What real tokens get, and what all heads and sinks get back from them for some gradient."""
    T, N, K = rows.positions.shape[1], 4, 2
    q, k, v = heads(seed, T, N, K=K)
    real = (rows.segments > 0)[..., None, None]
    weights = jnp.where(real, jnp.asarray(np.random.default_rng(seed + 1).normal(size=q.shape), jnp.float32), 0)
    sinks = jnp.array([-1.0, 0.5, 2.0, 0.0]) if how.pop("sinks", False) else None

    @jax.jit
    def pull(q, k, v, sinks):
        out, back = jax.vjp(lambda q, k, v, sinks: attend(q, k, v, rows, sinks=sinks, **how), q, k, v, sinks)
        return jnp.where(real, out, 0), back(weights)

    return pull(q, k, v, sinks)


def assert_same(found, expected):
    for ours, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, other, atol=3e-5)
        assert float(jnp.abs(other).max()) > 0.1


@pytest.mark.parametrize(
    "how",
    [{}, {"window": 70}, {"window": 70, "sinks": True, "soft_cap": 1.5, "scale": 0.7}],
    ids=["all", "window", "window, sinks, cap"],
)
@pytest.mark.parametrize("long", LONG.values(), ids=LONG)
def test_blocks_have_the_values_and_gradients_of_all_scores_at_once(long, how):
    assert_same(pulled(in_blocks, long, **how), pulled(at_once, long, **how))


@pytest.mark.parametrize("window", [70, NO_WINDOW])
@pytest.mark.parametrize("long", LONG.values(), ids=LONG)
def test_rows_of_several_blocks_equal_the_plain_loop(long, window):
    q, k, v = heads(0, 300, 2, K=1)
    real = np.asarray(long.segments) > 0
    found, expected = in_blocks(q, k, v, long, window), loop(q, k, v, seen(long, long, window))
    np.testing.assert_allclose(found[real], expected[real], atol=5e-6)


def test_a_block_begins_at_the_first_tile_that_it_sees_and_ends_at_the_last():
    row = where([4, 2, 6, -4])
    tiles = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(1, 8, 2), 1, 0), row)
    met = functools.partial(_met, How(1.0, None, True, 2), tiles, tiles, 0)
    assert [x.tolist() for x in met(NO_WINDOW)] == [[0, 0, 2, 3, 3, 3, 6, 6], [1, 2, 3, 4, 5, 6, 7, 8]]
    assert [x.tolist() for x in met(2)] == [[0, 0, 2, 3, 3, 4, 6, 6], [1, 2, 3, 4, 5, 6, 7, 8]]
    later = _met(How(1.0, None, True, 2), tiles, tiles, -16, NO_WINDOW)
    assert not later[1].any()


def test_what_blocks_gave_is_kept_by_the_policy_that_keeps_what_is_dear():
    q, k, v = heads(0, 9, 2)
    attend = lambda q: blocks(q, k, v, ROWS).sum()

    def passes(policy):
        program = jax.make_jaxpr(jax.grad(jax.checkpoint(attend, policy=POLICIES[policy])))(q)
        return str(program).count("scan[")

    assert passes("dots") == 2
    assert passes("block") == 3


def test_the_softmax_is_float32_whatever_the_heads_are():
    q, k, v = (x.astype(jnp.bfloat16) for x in heads(3, 9, 2))
    for attend in FORMS:
        out = attend(q, k, v, ROWS)
        assert out.dtype == jnp.bfloat16
        np.testing.assert_allclose(out.astype(jnp.float32), loop(q, k, v, seen(ROWS, ROWS, 99)), atol=0.02)


@pytest.mark.parametrize("attend", FORMS, ids=["plain", "blocks"])
def test_a_sink_takes_the_weight_of_a_key_that_has_no_value(attend):
    q, k, v = heads(9, 9, 4, K=2)
    sinks = jnp.array([-1.0, 0.0, 2.0, 30.0])
    found = attend(q, k, v, ROWS, sinks=sinks)
    mask = seen(ROWS, ROWS, NO_WINDOW)
    without = loop(q, k, v, mask)
    for b, t, n in np.ndindex(q.shape[:3]):
        scores = np.asarray(k, np.float64)[b, mask[b, t], n // 2] @ np.asarray(q, np.float64)[b, t, n] / 2
        share = np.exp(scores).sum() / (np.exp(scores).sum() + np.exp(float(sinks[n])))
        np.testing.assert_allclose(found[b, t, n], share * without[b, t, n], atol=1e-5)
