"""A file of a picture to 8-bit RGB, whatever it was saved as.

    grey, 1-bit, palette, CMYK, YCbCr     converted by Pillow
    transparent pixels                    laid on white, by their alpha
    16-bit grey                           value / 257, so that 65,535 is 255
    turned by its EXIF                    stands as people see it
    several frames                        the first one

How large a picture is stands in its header and is looked at before anything is decoded: 30,000 x 30,000 pixels pack
into a file of a few hundred kilobytes, and unpack to 2.7 GB. Colour profiles are left alone, as in torchvision.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from jaxsft.data.rows import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PIXELS = 64_000_000  # by default; a camera's picture has 12 to 50 million
MOST = 89_478_485  # beyond which Pillow itself warns of a bomb, and of twice as many refuses


def decode(source: str | bytes, max_pixels: int = MAX_PIXELS) -> "Image":
    """Reads a picture as 8-bit RGB.

    Args:
      source: the path of a file, or what is in one.
      max_pixels: the most that a picture may have, width times height.

    Raises:
      DataError: there is no such file, it is empty, no picture, broken, or too large.

    Example:
      >>> decode(b"not a picture")
      Traceback (most recent call last):
      jaxsft.data.rows.DataError: it is no picture that Pillow can read; it begins with b'not a picture'
    """
    with _opened(source, max_pixels) as image:
        try:
            image.load()
            return rgb(image)
        except DataError:
            raise
        except Exception as error:  # Pillow's decoders raise whatever their formats suggest
            raise DataError(f"it is broken ({_words(error)}); save it again, or remove the row") from error


def size(source: str | bytes, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Width and height from the header alone, before it is turned; raises as `decode`.

    Example:
      >>> size(b"")
      Traceback (most recent call last):
      jaxsft.data.rows.DataError: it is empty, 0 bytes; save it again, or remove the row
    """
    with _opened(source, max_pixels) as image:
        return image.size


@contextmanager
def _opened(source: str | bytes, max_pixels: int) -> "Iterator[Image]":
    from PIL import Image, UnidentifiedImageError

    file = io.BytesIO(source) if isinstance(source, bytes) else source
    try:
        image = Image.open(file)
    except UnidentifiedImageError as error:
        raise _no_picture(source) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f"it has more than {MOST:,} pixels, the most there may be; make it smaller") from error
    except FileNotFoundError as error:
        raise DataError("there is no such file") from error
    except Exception as error:
        raise DataError(f"it cannot be opened ({_words(error)})") from error
    with image:
        wide, high = image.size
        if wide * high > max_pixels:
            raise DataError(
                f"it is {wide:,} x {high:,}, more than data.max_pixels, {max_pixels:,}; make it smaller, or raise that"
            )
        yield image


def _no_picture(source: str | bytes) -> DataError:
    if isinstance(source, str):
        with open(source, "rb") as file:
            source = file.read(24)
    if not source:
        return DataError("it is empty, 0 bytes; save it again, or remove the row")
    return DataError(f"it is no picture that Pillow can read; it begins with {source[:24]!r}")


def _words(error: Exception) -> str:
    """What an error says, on one line."""
    return " ".join(str(error).split())[:120] or type(error).__name__


def rgb(image: "Image") -> "Image":
    """Brings a decoded picture to 8-bit RGB, turned as its EXIF says.

    Raises:
      DataError: its pixels have no range: floats, or integers beyond 16 bits.

    Example:
      >>> from PIL import Image
      >>> rgb(Image.new("RGBA", (1, 1), (255, 0, 0, 128))).getpixel((0, 0))  # half red, on white
      (255, 127, 127)
    """
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        return Image.fromarray(_eight_bits(np.asarray(image))).convert("RGB")
    if image.mode == "F":
        raise DataError("its pixels are floats, whose range nobody says; save it with 8 or 16 bits a pixel")
    if "transparency" in image.info or "A" in image.mode.upper().removesuffix("LAB"):
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image).convert("RGB")
    return image.convert("RGB")


def _eight_bits(values: np.ndarray) -> np.ndarray:
    values = values.astype(np.int64)
    if values.min(initial=0) < 0 or values.max(initial=0) > 0xFFFF:
        raise DataError(
            f"its pixels go from {values.min()} to {values.max()}, beyond the 16 bits of 0 to 65535; save it with 8"
        )
    return ((values + 128) // 257).astype(np.uint8)
