"""Every kind of picture becomes the RGB that its pixels mean; what is no picture says so."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from jaxsft.data import DataError
from jaxsft.data.images import decode

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def saved(image: Image.Image, kind: str = "PNG", **how) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **how)
    return stream.getvalue()


def pixels(content: bytes) -> list:
    return np.asarray(decode(content)).tolist()


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(wide: int, high: int, bits: int, colour: int, data: bytes, *more: bytes) -> bytes:
    """A PNG by hand; `data` are the lines, each with its filter's number in front."""
    header = struct.pack(">IIBBBBB", wide, high, bits, colour, 0, 0, 0)
    body = chunk(b"IHDR", header) + b"".join(more) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def test_rgb_stays():
    image = Image.fromarray(np.array([[RED, GREEN], [BLUE, (1, 2, 3)]], np.uint8))
    assert pixels(saved(image)) == [[list(RED), list(GREEN)], [list(BLUE), [1, 2, 3]]]


def test_grey_and_one_bit_become_three_equal_channels():
    assert pixels(png(3, 1, 8, 0, b"\0" + bytes([0, 7, 255]))) == [[[0] * 3, [7] * 3, [255] * 3]]
    assert pixels(png(3, 1, 1, 0, b"\0" + bytes([0b01000000]))) == [[[0] * 3, [255] * 3, [0] * 3]]


def test_sixteen_bits_of_grey_are_scaled_and_not_cut_off():
    values = [0, 128, 129, 257, 32768, 65535]
    assert Image.open(io.BytesIO(png(6, 1, 16, 0, b"\0" + struct.pack(">6H", *values)))).mode == "I;16"
    found = pixels(png(6, 1, 16, 0, b"\0" + struct.pack(">6H", *values)))[0]
    assert [pixel[0] for pixel in found] == [round(value / 257) for value in values]
    assert all(len(set(pixel)) == 1 for pixel in found)


def test_integers_beyond_sixteen_bits_and_floats_are_refused():
    for values, words in (((0, 70_000), "from 0 to 70000"), ((-1, 0), "from -1 to 0")):
        with pytest.raises(DataError, match=words):
            decode(saved(Image.fromarray(np.array([values], np.int32)), "TIFF"))
    assert pixels(saved(Image.fromarray(np.array([[0, 65535]], np.int32)), "TIFF")) == [[[0] * 3, [255] * 3]]
    with pytest.raises(DataError, match="floats"):
        decode(saved(Image.fromarray(np.ones((1, 1), np.float32)), "TIFF"))


def test_transparent_pixels_lie_on_white():
    half = Image.fromarray(np.array([[(255, 0, 0, 255), (255, 0, 0, 0), (0, 0, 0, 128)]], np.uint8))
    assert pixels(saved(half)) == [[list(RED), list(WHITE), [127] * 3]]
    grey = Image.merge("LA", [Image.new("L", (1, 1), 0), Image.new("L", (1, 1), 0)])
    assert pixels(saved(grey)) == [[list(WHITE)]]


def test_a_palette_and_its_transparent_colour():
    image = Image.new("P", (3, 1))
    image.putpalette([*RED, *GREEN, *BLUE])
    image.putdata([0, 1, 2])
    assert pixels(saved(image)) == [[list(RED), list(GREEN), list(BLUE)]]
    assert pixels(saved(image, transparency=1)) == [[list(RED), list(WHITE), list(BLUE)]]
    assert pixels(saved(image, transparency=bytes([255, 255, 0]))) == [[list(RED), list(GREEN), list(WHITE)]]


def test_a_transparent_colour_without_a_palette():
    image = Image.fromarray(np.array([[RED, GREEN]], np.uint8))
    assert pixels(saved(image, transparency=GREEN)) == [[list(RED), list(WHITE)]]
    assert pixels(saved(Image.new("L", (1, 1), 9), transparency=9)) == [[list(WHITE)]]


def test_cmyk_is_ink():
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # magenta and yellow are red
    assert np.abs(np.asarray(decode(saved(image, "TIFF"))).astype(int) - RED).max() == 0
    assert np.abs(np.asarray(decode(saved(image, "JPEG", quality=100))).astype(int) - RED).max() <= 2


@pytest.mark.parametrize(
    ("orientation", "wanted"),
    [(1, "ab cd"), (2, "ba dc"), (3, "dc ba"), (4, "cd ab"), (5, "ac bd"), (6, "ca db"), (7, "db ca"), (8, "bd ac")],
)
def test_exif_turns_a_picture(orientation, wanted):
    """The picture ab over cd, as a camera that was held otherwise stores it."""
    values = {"a": 10, "b": 20, "c": 30, "d": 40}
    image = Image.fromarray(np.array([[10, 20], [30, 40]], np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = np.asarray(decode(saved(image, exif=exif)))[..., 0].tolist()
    assert found == [[values[name] for name in line] for line in wanted.split()]


def test_the_first_of_several_frames():
    frames = [Image.new("P", (2, 2), 0), Image.new("P", (2, 2), 0)]
    frames[0].putpalette(list(RED))
    frames[1].putpalette(list(BLUE))
    assert pixels(saved(frames[0], "GIF", save_all=True, append_images=frames[1:])) == [[list(RED)] * 2] * 2


def test_a_file_is_read_by_its_content_whatever_it_is_called(tmp_path):
    file = tmp_path / "photo.jpg"
    file.write_bytes(saved(Image.new("RGB", (2, 1), BLUE)))
    assert np.asarray(decode(str(file))).tolist() == [[list(BLUE)] * 2]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "there is no such file"),
        (b"", "is empty, 0 bytes"),
        (b"dear diary, today", "no picture that Pillow can read; it begins with b'dear diary, today'"),
        (saved(Image.effect_noise((64, 64), 50), "JPEG")[:900], "is broken .*truncated"),
        (saved(Image.effect_noise((64, 64), 50))[:900], "is broken"),
        (png(30_000, 30_000, 1, 0, b""), "more than .* pixels"),
        (png(9_000, 9_000, 1, 0, b""), "it is 9,000 x 9,000, more than data.max_pixels, 64,000,000"),
    ],
    ids=["missing", "empty", "text", "truncated jpeg", "truncated png", "bomb", "too large"],
)
def test_what_is_no_picture_says_why(tmp_path, content, words):
    file = tmp_path / "photo.jpg"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(DataError, match=words):
        decode(str(file))


def test_the_limit_is_that_of_the_caller():
    content = saved(Image.new("RGB", (5, 4)))
    assert decode(content, max_pixels=20).size == (5, 4)
    with pytest.raises(DataError, match="5 x 4, more than data.max_pixels, 19"):
        decode(content, max_pixels=19)
