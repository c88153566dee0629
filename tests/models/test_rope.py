import math

import jax.numpy as jnp
import numpy as np
import pytest

from jaxsft.models import rope
from jaxsft.models.rope import Rope

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def transformers_frequencies(theta, head_dim, scaling=None, original=None):
    """One frequency at a time, after the rope_type entries of transformers' RoPE utilities documentation."""
    found = []
    for i in range(0, head_dim, 2):
        frequency = 1 / theta ** (i / head_dim)
        kind = (scaling or {}).get("rope_type", "default")
        if kind == "linear":
            frequency /= scaling["factor"]
        if kind == "llama3":
            wavelength = 2 * math.pi / frequency
            low, high = original / scaling["low_freq_factor"], original / scaling["high_freq_factor"]
            if wavelength > low:
                frequency /= scaling["factor"]
            elif wavelength >= high:
                span = scaling["high_freq_factor"] - scaling["low_freq_factor"]
                smooth = (original / wavelength - scaling["low_freq_factor"]) / span
                frequency = (1 - smooth) * frequency / scaling["factor"] + smooth * frequency
        found.append(frequency)
    return np.array(found)


def turn(x, positions, inverse):
    """[T, H] features at the given positions, through the code under test."""
    cos, sin = rope.angles(jnp.asarray(positions)[None], inverse)
    return np.asarray(rope.rotate(jnp.asarray(x)[None, :, None], cos, sin)[0, :, 0])


@pytest.mark.parametrize("head_dim", [2, 8, 64, 128])
@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
def test_default_and_linear_frequencies_equal_the_documented_ones(head_dim, theta):
    plain = transformers_frequencies(theta, head_dim)
    np.testing.assert_allclose(rope.frequencies(Rope(theta), head_dim), plain, rtol=1e-6)
    linear = transformers_frequencies(theta, head_dim, {"rope_type": "linear", "factor": 4.0})
    np.testing.assert_allclose(rope.frequencies(Rope(theta, "linear", 4.0), head_dim), linear, rtol=1e-6)


@pytest.mark.parametrize(("theta", "original"), [(500_000.0, 8192), (10_000.0, 256), (10_000.0, 32)])
def test_llama3_frequencies_equal_the_documented_ones(theta, original):
    scaling = {"rope_type": "llama3", **LLAMA3}
    expected = transformers_frequencies(theta, 64, scaling, original)
    found = rope.frequencies(Rope(theta, "llama3", original_max_position=original, **LLAMA3), 64)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    ratio = transformers_frequencies(theta, 64) / expected
    assert ratio.min() == pytest.approx(1)
    assert ratio.max() == pytest.approx(8)
    assert np.any((ratio > 1.01) & (ratio < 7.9))  # fast, slow and blended waves all occurred


@pytest.mark.parametrize("truncate", [True, False])
def test_yarn_keeps_fast_waves_stretches_slow_ones_and_blends_those_between(truncate):
    rope_ = Rope(10_000.0, "yarn", factor=8.0, original_max_position=512, truncate=truncate)
    found, plain = rope.frequencies(rope_, 64), rope.frequencies(Rope(10_000.0), 64)
    turns = 512 * plain / (2 * np.pi)  # of each wave over the original positions
    if not truncate:
        np.testing.assert_allclose(found[turns > 32], plain[turns > 32], rtol=1e-6)
        np.testing.assert_allclose(found[turns < 1], plain[turns < 1] / 8, rtol=1e-6)
    low, high = (32 * np.log(512 / (2 * np.pi * t)) / np.log(10_000) for t in (32, 1))
    low, high = (np.floor(low), np.ceil(high)) if truncate else (low, high)
    for i in range(32):  # equation 20's ramp over features
        stretched = min(max((i - low) / (high - low), 0), 1)
        assert found[i] == pytest.approx(plain[i] * (stretched / 8 + 1 - stretched), rel=1e-5)
    assert rope.amplitude(rope_) == pytest.approx(0.1 * np.log(8) + 1)
    assert rope.amplitude(Rope(kind="yarn", factor=8.0, attention_factor=1.5)) == 1.5


def test_a_layer_without_rope_leaves_heads_as_they_are():
    x = np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32)
    np.testing.assert_array_equal(turn(x, [0, 1, 2, 7, 300], rope.frequencies(Rope(kind="none"), 8)), x)


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="rope type 'ntk' is not known; known are default, linear, llama3"):
        rope.frequencies(Rope(kind="ntk"), 8)


def test_dynamic_frequencies_grow_with_the_length_beyond_the_original():
    """One at a time, after transformers' `rope_type: dynamic`."""
    given = Rope(10_000.0, "dynamic", factor=4.0, original_max_position=32)
    lengths = [1, 32, 33, 64, 500]
    found = rope.stretched(given, 16, jnp.array([lengths]))[0]
    for length, row in zip(lengths, found, strict=True):
        theta = 10_000.0 * (4.0 * max(length, 32) / 32 - 3.0) ** (16 / 14)
        np.testing.assert_allclose(row, [theta ** (-i / 16) for i in range(0, 16, 2)], rtol=2e-6)
    np.testing.assert_array_equal(found[0], found[1])


def test_longrope_has_one_set_of_factors_up_to_the_original_length_and_one_beyond():
    short, long = (1.0, 1.5, 2.0, 2.5), (1.0, 3.0, 9.0, 27.0)
    given = Rope(10_000.0, "longrope", 8.0, original_max_position=32, short_factor=short, long_factor=long)
    found = rope.stretched(given, 8, jnp.array([[32, 33]]))[0]
    for factors, row in zip((short, long), found, strict=True):
        np.testing.assert_allclose(row, transformers_frequencies(10_000.0, 8) / np.array(factors), rtol=1e-6)
    assert rope.amplitude(given) == pytest.approx(math.sqrt(1 + math.log(8) / math.log(32)))


def test_features_beyond_the_partial_share_stay_as_they_are():
    x = np.random.default_rng(2).normal(size=(3, 16)).astype(np.float32)
    inverse = rope.frequencies(Rope(partial=0.5), 16)
    found = turn(x, [3, 9, 40], inverse)
    np.testing.assert_array_equal(found[:, 8:], x[:, 8:])
    np.testing.assert_array_equal(found[:, :8], turn(x[:, :8], [3, 9, 40], rope.frequencies(Rope(), 8)))


def test_the_rotation_turns_feature_i_with_feature_i_plus_half():
    draw, inverse = np.random.default_rng(0), rope.frequencies(Rope(), 8)
    x, positions = draw.normal(size=(5, 8)).astype(np.float32), [0, 1, 2, 7, 300]
    expected = np.zeros_like(x)
    for t, position in enumerate(positions):
        for i in range(4):
            z = complex(x[t, i], x[t, i + 4]) * np.exp(1j * position * float(inverse[i]))
            expected[t, i], expected[t, i + 4] = z.real, z.imag
    np.testing.assert_allclose(turn(x, positions, inverse), expected, atol=2e-5)


def test_the_rotation_keeps_norms_and_position_zero_changes_nothing():
    x, inverse = np.random.default_rng(1).normal(size=(6, 16)).astype(np.float32), rope.frequencies(Rope(), 16)
    turned = turn(x, [0, 1, 10, 100, 1000, 8000], inverse)
    np.testing.assert_array_equal(turned[0], x[0])
    np.testing.assert_allclose(np.linalg.norm(turned, axis=1), np.linalg.norm(x, axis=1), rtol=1e-5)


def test_scores_depend_only_on_the_distance():
    q, k = np.random.default_rng(2).normal(size=(2, 16)).astype(np.float32)
    inverse, starts = rope.frequencies(Rope(), 16), np.array([0, 1, 17, 250])
    for distance in (0, 1, 5, 40):
        left = turn(np.tile(q, (4, 1)), starts + distance, inverse)
        scores = (left * turn(np.tile(k, (4, 1)), starts, inverse)).sum(axis=1)
        np.testing.assert_allclose(scores, scores[0], atol=2e-4)


def test_angles_are_exact_float32_where_bfloat16_would_fold_positions_together():
    x = jnp.ones((1, 2, 1, 4), jnp.bfloat16)
    cos, sin = rope.angles(jnp.array([[1000, 1001]]), rope.frequencies(Rope(), 4))
    assert cos.dtype == sin.dtype == jnp.float32
    np.testing.assert_allclose(cos[0, :, 0, 0], np.cos([1000.0, 1001.0]), atol=1e-4)
    assert rope.rotate(x, cos, sin).dtype == jnp.bfloat16
