import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsft import losses

B, N, D, SCALE = 4, 2, 3, 5.0
TEXTS = np.array([[0, 4, 5], [1, 6, -1], [0, 7, 1], [-1, -1, -1]])  # two rows share a text; the last one fills up


def vectors(seed=0):
    draw = np.random.default_rng(seed)
    shapes = ((B, D), (B, D), (B, N, D))
    made = [draw.normal(size=shape).astype(np.float32) for shape in shapes]
    return [x / np.linalg.norm(x, axis=-1, keepdims=True) for x in made]


def by_loop(q, p, n, texts, *, symmetric=False, margin=None):
    """The loss of each row, candidate by candidate."""
    candidates = [(int(texts[i, 0]), p[i]) for i in range(B)]
    candidates += [(int(texts[i, 1 + j]), n[i, j]) for i in range(B) for j in range(N)]
    cos = lambda a, b: float(np.dot(a.astype(np.float64), b))

    def wrong(i):
        own = cos(q[i], p[i])
        for at, (text, x) in enumerate(candidates):
            near = margin is not None and cos(q[i], x) > own + margin
            if text >= 0 and text != texts[i, 0] and not near:
                yield at, cos(q[i], x)

    out = []
    for i in range(B):
        if texts[i, 0] < 0:
            out.append(0.0)
            continue
        right = math.exp(SCALE * cos(q[i], p[i]))
        loss = -math.log(right / (right + sum(math.exp(SCALE * s) for _, s in wrong(i))))
        if symmetric:
            others = [j for j in range(B) if texts[j, 0] >= 0 and i in [at for at, _ in wrong(j)]]
            back = sum(math.exp(SCALE * cos(q[j], p[i])) for j in others)
            loss = (loss - math.log(right / (right + back))) / 2
        out.append(loss)
    return out


@pytest.mark.parametrize("options", [{}, {"symmetric": True}, {"margin": 0.1}, {"symmetric": True, "margin": 0.0}])
def test_the_loss_is_that_of_a_loop_over_candidates(options):
    q, p, n = vectors()
    found, metrics = losses.contrastive(q, p, n, scale=SCALE, texts=jnp.asarray(TEXTS), **options)
    np.testing.assert_allclose(found, by_loop(q, p, n, TEXTS, **options), rtol=1e-5)
    assert all(value.shape == (B,) and value[-1] == 0 for value in metrics.values())


def test_without_texts_every_other_passage_is_wrong():
    q, p, n = vectors(1)
    distinct = np.arange(B * (1 + N)).reshape(B, 1 + N)
    np.testing.assert_allclose(losses.contrastive(q, p, n, scale=SCALE)[0], by_loop(q, p, n, distinct), rtol=1e-5)
    alone, metrics = losses.contrastive(q, p, scale=SCALE)
    one = np.concatenate([np.arange(B)[:, None], np.full((B, N), -1)], axis=1)
    np.testing.assert_allclose(alone, by_loop(q, p, n, one), rtol=1e-5)
    np.testing.assert_array_equal(metrics["accuracy"], (q @ p.T).argmax(axis=1) == np.arange(B))


def test_one_text_twice_in_a_batch_pushes_no_question_away():
    q, p, _ = vectors(2)
    p[1] = p[0]
    same = jnp.array([[0], [0], [1], [2]])
    pull = jax.grad(lambda q, texts: losses.contrastive(q, p, texts=texts)[0][:2].sum())
    apart = pull(q, None)
    together = pull(q, same)
    assert np.abs(apart - together).max() > 1e-3
    q, p, same = q[:2], p[:2], same[:2]  # nothing is left to be told apart
    loss, grads = jax.value_and_grad(lambda q: losses.contrastive(q, p, texts=same)[0].sum())(q)
    assert (float(loss), np.abs(grads).max()) == (0, 0)
