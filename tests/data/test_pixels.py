"""What becomes of an image before a model sees it, against Pillow, plain loops, and the files that say so."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaxsft.data import pixels
from jaxsft.data.pixels import Preprocess
from jaxsft.data.rows import DataError


def drawn(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8))


@pytest.mark.parametrize(("config", "expected"), [
    ({"image_processor_type": "ViTImageProcessor"}, ((224, 224), None, 2)),
    ({"image_processor_type": "ViTImageProcessorFast", "size": {"height": 32, "width": 48}}, ((32, 48), None, 2)),
    ({"feature_extractor_type": "ViTFeatureExtractor", "size": 384, "resample": 3}, ((384, 384), None, 3)),
    ({"image_processor_type": "DeiTImageProcessor"}, ((256, 256), (224, 224), 3)),
    ({"image_processor_type": "DeiTImageProcessor", "do_center_crop": False}, ((256, 256), None, 3)),
    ({"feature_extractor_type": "CLIPFeatureExtractor", "size": 224, "crop_size": 224}, (224, (224, 224), 3)),
    ({"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 256}}, (256, (224, 224), 3)),
    ({"image_processor_type": "SiglipImageProcessor", "do_convert_rgb": None}, ((224, 224), None, 3)),
    ({"feature_extractor_type": "ConvNextFeatureExtractor", "size": 224, "crop_pct": 0.95}, (235, (224, 224), 3)),
    ({"image_processor_type": "ConvNextImageProcessor"}, ((384, 384), None, 3)),
    ({"image_processor_type": "ViTImageProcessor", "do_resize": False, "do_center_crop": True, "crop_size": 8},
     (None, (8, 8), 2)),
])  # fmt: skip
def test_a_file_of_any_age_is_read(config, expected):
    assert pixels.parse(config)[:3] == expected


@pytest.mark.parametrize(("config", "message"), [
    ({"image_processor_type": "Pix2StructImageProcessor"}, "'Pix2StructImageProcessor' is not supported; supported"),
    ({"image_processor_type": "ViTImageProcessor", "do_pad": True}, "'do_pad' is True, which is not done here"),
    ({"image_processor_type": "ViTImageProcessor", "size": {"longest_edge": 9}}, "size {'longest_edge': 9} is not"),
    ({"image_processor_type": "CLIPImageProcessor", "do_center_crop": False}, "without a crop leaves images of other"),
])  # fmt: skip
def test_what_is_not_done_is_told(config, message, tmp_path):
    (tmp_path / pixels.FILE).write_text(json.dumps(config))
    with pytest.raises(DataError, match=message):
        pixels.read(tmp_path)


def test_a_missing_or_broken_file_is_told(tmp_path):
    with pytest.raises(DataError, match="has no preprocessor_config.json, which says how a model wants images"):
        pixels.read(tmp_path)
    (tmp_path / pixels.FILE).write_text("{")
    with pytest.raises(DataError, match="is not valid JSON"):
        pixels.read(tmp_path)


@pytest.mark.parametrize("how", [
    Preprocess(),
    Preprocess(256, (224, 196), 3, 1.0, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)),
    Preprocess(None, (8, 8)),
])  # fmt: skip
def test_what_is_described_is_read_again(how, tmp_path):
    (tmp_path / pixels.FILE).write_text(json.dumps(pixels.describe(how)))
    assert pixels.read(tmp_path) == how


@pytest.mark.parametrize(("width", "height"), [(30, 17), (17, 30), (20, 20)])
def test_the_shorter_side_is_resized_and_the_middle_taken(width, height):
    image, side = drawn(width, height), 20
    got = pixels.apply(Preprocess(side, (12, 16)), image)
    wide, high = (side, int(side * height / width)) if width <= height else (int(side * width / height), side)
    left, top = (wide - 16) // 2, (high - 12) // 2
    expected = image.resize((wide, high), Image.Resampling.BILINEAR).crop((left, top, left + 16, top + 12))
    np.testing.assert_array_equal(got, np.asarray(expected))


def test_an_image_smaller_than_its_middle_is_surrounded_with_zeros():
    got = pixels.apply(Preprocess(None, (4, 5)), drawn(2, 7))
    expected = np.zeros((4, 5, 3), np.uint8)
    expected[:, 2:4] = np.asarray(drawn(2, 7))[1:5]
    np.testing.assert_array_equal(got, expected)


def test_pixels_are_normalised_channel_by_channel():
    how = Preprocess(mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 2.0))
    image = np.asarray(drawn(3, 2))[None]
    got = pixels.normalise(how, jnp.asarray(image))
    for channel in range(3):
        expected = (image[..., channel] / 255 - how.mean[channel]) / how.std[channel]
        np.testing.assert_allclose(got[..., channel], expected, atol=1e-6)
    np.testing.assert_array_equal(pixels.normalise(how, jnp.asarray(image, jnp.float32)), got)
