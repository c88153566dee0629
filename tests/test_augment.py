"""Augmentation: each change against a loop over pixels or a closed form; and what its randomness hangs on."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from jaxsft import augment
from jaxsft.types import Images

KEY = jax.random.key(3)


@pytest.fixture(scope="module")
def picture():
    return np.random.default_rng(0).integers(0, 256, (9, 7, 3)).astype(np.float32)


def made(count: int, size: tuple[int, int] = (8, 8), first_turn: int = 0, real: int | None = None) -> Images:
    draw = np.random.default_rng(1)
    pixels = draw.integers(0, 256, (count, *size, 3), np.uint8)
    column = lambda values, kind: jnp.asarray(np.asarray(values)[:, None].astype(kind))
    numbers = np.arange(count)
    rows = np.where(numbers < (count if real is None else real), numbers, -1)
    turns = column(first_turn + numbers, np.uint32)
    return Images(jnp.asarray(pixels), column(numbers % 3, np.int32), column(rows, np.int32), turns)


identity = lambda x: x.astype(jnp.float32)


@functools.cache
def applied(how: augment.Config):
    return jax.jit(lambda batch: augment.apply(how, batch, KEY, classes=3, normalise=identity))


# ---- rectangles -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("box", [(0, 0, 9, 7), (2, 1, 5, 4), (8, 6, 1, 1), (0, 3, 9, 2)])
def test_a_crop_is_resized_as_a_loop_over_pixels_does_it(picture, box):
    top, left, high, wide = box
    part, wanted = picture[top : top + high, left : left + wide], np.zeros_like(picture)
    for row in range(9):
        for column in range(7):
            y = min(max((row + 0.5) * high / 9 - 0.5, 0), high - 1)
            x = min(max((column + 0.5) * wide / 7 - 0.5, 0), wide - 1)
            y0, x0 = int(y), int(x)
            y1, x1 = min(y0 + 1, high - 1), min(x0 + 1, wide - 1)
            upper = part[y0, x0] * (1 - (x - x0)) + part[y0, x1] * (x - x0)
            lower = part[y1, x0] * (1 - (x - x0)) + part[y1, x1] * (x - x0)
            wanted[row, column] = upper * (1 - (y - y0)) + lower * (y - y0)
    assert np.allclose(augment.cropped(jnp.asarray(picture), tuple(map(jnp.int32, box))), wanted, atol=1e-3)


def test_boxes_have_the_area_and_the_form_that_was_asked_for():
    draw = jax.vmap(lambda key: augment.draw_box(key, (200, 200), area=(0.1, 0.5), ratio=2.0))
    top, left, high, wide = map(np.asarray, draw(jax.random.split(KEY, 2000)))
    share, form = high * wide / 200**2, wide / high
    assert 0.09 < share.min() < share.max() < 0.51
    assert abs(share.mean() - 0.3) < 0.01  # uniform
    assert 0.49 < form.min() < form.max() < 2.05
    assert abs(np.log(form).mean()) < 0.03  # as often wide as high
    assert (top >= 0).all()
    assert (top + high <= 200).all()
    assert (left + wide <= 200).all()
    assert (top == 0).any()
    assert (top + high == 200).any()


def test_a_box_that_would_not_fit_is_cut():
    draw = jax.vmap(lambda key: augment.draw_box(key, (10, 40), area=(0.9, 1.0), ratio=8.0))
    top, _, high, wide = map(np.asarray, draw(jax.random.split(KEY, 200)))
    assert (top + high <= 10).all()
    assert high.max() == 10
    assert wide.max() == 40


def test_mirrors_are_as_likely_as_they_should_be():
    batch = made(400)
    found = np.asarray(applied(augment.Config(crop=1.0, flip=0.3))(batch).pixels)
    plain = np.asarray(batch.pixels, np.float32)
    flipped = (found == plain[:, :, ::-1]).all((1, 2, 3))
    assert ((found == plain).all((1, 2, 3)) ^ flipped).all()
    assert abs(flipped.mean() - 0.3) < 0.06


def test_erasing_takes_one_rectangle_of_the_size_that_it_should():
    batch = made(300, (20, 20))
    found = np.asarray(applied(augment.Config(crop=1.0, flip=0.0, erase=0.5))(batch).pixels)
    gone = (found != np.asarray(batch.pixels, np.float32)).any(-1)
    assert abs(gone.any((1, 2)).mean() - 0.5) < 0.1
    for mask, picture in zip(gone, found, strict=True):
        if mask.any():
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            inside = picture[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            assert not inside.any()
            assert 0.01 < inside[..., 0].size / 400 < 0.36


# ---- colours --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "pillow"),
    [
        (augment.brightness, ImageEnhance.Brightness),
        (augment.contrast, ImageEnhance.Contrast),
        (augment.saturation, ImageEnhance.Color),
    ],
    ids=["brightness", "contrast", "saturation"],
)
@pytest.mark.parametrize("factor", [0.0, 0.4, 1.0, 1.8])
def test_blends_are_those_of_pillow(picture, ours, pillow, factor):
    image = Image.fromarray(picture.astype(np.uint8))
    wanted = np.asarray(pillow(image).enhance(factor), np.float32)
    assert np.abs(np.asarray(ours(jnp.asarray(picture), jnp.float32(factor))) - wanted).max() <= 1.5  # it rounds twice


def test_bits_thresholds_and_stretching_are_those_of_pillow(picture):
    image, x = Image.fromarray(picture.astype(np.uint8)), jnp.asarray(picture)
    for bits in (1, 4, 8):
        assert np.array_equal(augment.posterize(x, bits), np.asarray(ImageOps.posterize(image, bits)))
    for threshold in (0, 100, 256):
        assert np.array_equal(augment.solarize(x, threshold), np.asarray(ImageOps.solarize(image, threshold)))
    narrow = np.clip(picture, 60, 130)
    stretched = ImageOps.autocontrast(Image.fromarray(narrow.astype(np.uint8)))
    assert np.abs(np.asarray(augment.autocontrast(jnp.asarray(narrow))) - np.asarray(stretched)).max() <= 1
    flat = jnp.full((3, 3, 3), 7.0)
    assert np.array_equal(augment.autocontrast(flat), flat)


def test_no_strength_changes_nothing_but_contrast_that_is_stretched():
    full = jnp.asarray(np.linspace(0, 255, 48).reshape(4, 4, 3).round(), jnp.float32)
    full = full.at[0, 0].set(0.0).at[3, 3].set(255.0)  # each colour from 0 to 255
    change = jax.jit(jax.vmap(lambda key: augment.coloured(key, full, 0.0)))
    assert np.allclose(change(jax.random.split(KEY, 12)), full)


def test_colours_stay_colours_and_differ():
    batch = made(64)
    found = np.asarray(applied(augment.Config(crop=1.0, flip=0.0, colours=2, strength=1.0))(batch).pixels)
    assert found.min() >= 0
    assert found.max() <= 255
    assert (np.abs(found - np.asarray(batch.pixels)).mean((1, 2, 3)) > 1).mean() > 0.7


# ---- two pictures ---------------------------------------------------------------------------------------------------


def test_mixup_is_one_share_of_two_pictures():
    batch = made(6)
    found = applied(augment.Config(crop=1.0, flip=0.0, mixup=0.8))(batch)
    plain, share = np.asarray(batch.pixels, np.float32), []
    for row, (picture, target) in enumerate(zip(*map(np.asarray, (found.pixels, found.targets)), strict=True)):
        other = 5 - row
        at = np.unravel_index(np.argmax(np.abs(plain[row] - plain[other])), plain[row].shape)
        share.append((picture[at] - plain[other][at]) / (plain[row][at] - plain[other][at]))
        assert np.allclose(picture, share[-1] * plain[row] + (1 - share[-1]) * plain[other], atol=1e-2)
        wanted = np.zeros(3)
        wanted[row % 3] += share[-1]
        wanted[other % 3] += 1 - share[-1]
        assert np.allclose(target, wanted, atol=1e-4)
    assert 0 <= min(share) < max(share) <= 1
    assert len(set(np.round(share, 4))) == 6  # each row has its own


def test_cutmix_puts_one_rectangle_of_the_other_in_and_counts_its_pixels():
    batch = made(40)
    found = applied(augment.Config(crop=1.0, flip=0.0, cutmix=1.0))(batch)
    plain = np.asarray(batch.pixels, np.float32)
    for row, (picture, target) in enumerate(zip(*map(np.asarray, (found.pixels, found.targets)), strict=True)):
        other = 39 - row
        mine = (picture == plain[row]).all(-1)
        rows, columns = np.flatnonzero(~mine.all(1)), np.flatnonzero(~mine.all(0))
        if len(rows):
            where = np.ix_(range(rows[0], rows[-1] + 1), range(columns[0], columns[-1] + 1))
            assert np.array_equal(picture[where], plain[other][where])
        wanted = np.zeros(3)
        wanted[row % 3] += mine.mean()
        wanted[other % 3] += 1 - mine.mean()
        assert np.allclose(target, wanted, atol=1e-6)


def test_the_share_of_a_rectangle_is_beta_but_for_the_edges():
    boxes = jax.vmap(lambda key: augment.cut_box(key, (64, 64), jnp.float32(0.25)))(jax.random.split(KEY, 500))
    covered = np.asarray(boxes.mean((1, 2)))
    assert covered.max() <= 0.26
    middle = covered[covered > 0.24]
    assert len(middle) > 80  # (1 - 1/2)^2 of them lie whole inside


def test_both_kinds_of_mixing_occur():
    batch = made(200)
    found = np.asarray(applied(augment.Config(crop=1.0, flip=0.0, cutmix=1.0, mixup=1.0))(batch).pixels)
    plain = np.asarray(batch.pixels, np.float32)
    from_either = ((found == plain) | (found == plain[::-1])).all((1, 2, 3))
    assert 0.35 < from_either.mean() < 0.65


def test_rows_that_fill_up_a_batch_are_not_mixed_in():
    batch = made(8, real=5)  # 5, 6 and 7 fill up; 0, 1 and 2 would be mixed with them
    found = applied(augment.Config(crop=1.0, flip=0.0, mixup=1.0))(batch)
    alone = (np.asarray(found.pixels) == np.asarray(batch.pixels, np.float32)).all((1, 2, 3))
    assert alone.tolist() == [True, True, True, False, False, True, True, True]
    assert np.allclose(np.asarray(found.targets)[:3], np.eye(3))


# ---- what randomness hangs on ---------------------------------------------------------------------------------------

ALL = augment.Config(crop=0.3, colours=1, erase=0.5)


def test_a_row_is_changed_the_same_way_in_any_batch():
    whole, parts = made(8), made(8)
    piece = jax.tree.map(lambda x: x[2:6], parts)
    assert np.array_equal(applied(ALL)(whole).pixels[2:6], applied(ALL)(piece).pixels)


def test_a_row_is_changed_in_another_way_when_it_comes_again():
    early, late = made(4), made(4, first_turn=4)
    assert not np.array_equal(applied(ALL)(early).pixels, applied(ALL)(late).pixels)
    assert np.array_equal(applied(ALL)(early).pixels, applied(ALL)(made(4)).pixels)


def test_none_changes_nothing():
    batch = made(3)
    found = applied(augment.NONE)(batch)
    assert np.array_equal(found.pixels, batch.pixels)
    assert np.array_equal(found.targets, np.eye(3))


@pytest.mark.parametrize(
    "wrong",
    [{"crop": 0.0}, {"crop": 1.5}, {"ratio": 0.5}, {"flip": -0.1}, {"mixup": -1.0}, {"label_smoothing": 2.0}],
    ids=str,
)
def test_settings_that_cannot_be(wrong):
    with pytest.raises(ValueError, match=f"augment.{next(iter(wrong))}"):
        replace(augment.NONE, **wrong)
