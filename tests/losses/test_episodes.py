import jax.numpy as jnp
import numpy as np

from jaxsft.losses import episode_count, episode_mean, episode_sum, last, shift

SEGMENTS = np.array([[1, 1, 1, 2, 2, 3, 3, 3], [1, 1, 1, 1, 1, 1, 1, 1], [1, 1, 2, 2, 0, 0, 0, 0], [0] * 8])
SAMPLED = np.array([[0, 1, 1, 0, 1, 0, 0, 1], [0, 0, 1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 0, 0, 0, 0], [0] * 8], bool)
LEARNED = np.asarray(shift(jnp.asarray(SEGMENTS), jnp.asarray(SAMPLED), jnp.asarray(SEGMENTS))[1])


def test_sums_and_means_are_those_of_each_episode_at_its_learned_positions():
    x = np.random.default_rng(0).normal(size=SEGMENTS.shape)
    totals, means = np.zeros(SEGMENTS.shape), np.zeros(SEGMENTS.shape)
    for row in range(4):
        for number in range(1, 4):
            here = LEARNED[row] & (SEGMENTS[row] == number)
            if here.any():
                totals[row, here], means[row, here] = x[row, here].sum(), x[row, here].mean()
    given = jnp.asarray(np.where(LEARNED, x, np.nan)), jnp.asarray(LEARNED), jnp.asarray(SEGMENTS)
    np.testing.assert_allclose(episode_sum(*given), totals, atol=1e-6)
    np.testing.assert_allclose(episode_mean(*given), means, atol=1e-6)


def test_the_last_position_of_an_episode_predicts_its_last_token():
    found = np.asarray(last(jnp.asarray(LEARNED)))
    for row, t in zip(*np.nonzero(found), strict=True):
        rest = SEGMENTS[row, t + 1 :]
        assert rest[0] == SEGMENTS[row, t]
        assert len(rest) == 1 or rest[1] != rest[0]
    assert found.sum() == 5  # the first of row 2 has no learned token


def test_episodes_count_whether_or_not_one_is_learned_and_padding_never_does():
    assert float(episode_count(jnp.asarray(SEGMENTS))) == 6
