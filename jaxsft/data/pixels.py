"""What a model wants to see of an image: `preprocessor_config.json`, read, done, and written again.

An image is resized and cropped by Pillow on the host, to 8-bit RGB; `normalise` makes float32 of that on the device:

    image (W x H) --apply--> uint8 [h, w, 3] --normalise--> float32, (x rescale - mean) / std

The pixels are those of transformers' processors with the PIL backend, bit for bit; its torchvision backend rounds
otherwise, and differs by a step of 255 here and there. Left out: padding, and sizes that differ between images.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from PIL import Image

from jaxsft.data.rows import DataError

FILE = "preprocessor_config.json"
HALF = (0.5, 0.5, 0.5)
IMAGENET = {"image_mean": (0.485, 0.456, 0.406), "image_std": (0.229, 0.224, 0.225)}
CLIP = {"image_mean": (0.48145466, 0.4578275, 0.40821073), "image_std": (0.26862954, 0.26130258, 0.27577711)}
STANDARD = {"image_mean": HALF, "image_std": HALF}
CROPPED = {"size": {"shortest_edge": 224}, "resample": 3, "do_center_crop": True, "crop_size": 224, **CLIP}
# What a kind of processor does where its file does not say; `square` is what a size of one number means.
KINDS: dict[str, dict[str, Any]] = {
    "BitImageProcessor": {**CROPPED, "square": False},
    "CLIPImageProcessor": {**CROPPED, "square": False},
    "ConvNextImageProcessor": {
        "size": {"shortest_edge": 384},
        "resample": 3,
        "crop_pct": 224 / 256,
        "square": False,
        **STANDARD,
    },
    "DeiTImageProcessor": {"size": 256, "resample": 3, "do_center_crop": True, "crop_size": 224, **STANDARD},
    "SiglipImageProcessor": {"size": 224, "resample": 3, **STANDARD},
    "ViTImageProcessor": {"size": 224, "resample": 2, **STANDARD},
}
READ = frozenset(
    "crop_pct crop_size do_center_crop do_normalize do_rescale do_resize image_mean image_std resample rescale_factor "
    "size".split()
)
# Where it runs, in what order it gives its axes, what is told of it: none changes a pixel of an RGB image.
NEUTRAL = frozenset(
    "_valid_processor_keys data_format default_to_square device disable_grouping do_convert_rgb feature_extractor_type "
    "image_processor_type input_data_format processor_class return_tensors transformers_version".split()
)


class Preprocess(NamedTuple):
    """What is done to an image."""

    size: tuple[int, int] | int | None = (224, 224)  # to this height and width, or the shorter side to so many pixels
    crop: tuple[int, int] | None = None  # what of the middle stays
    resample: int = 2  # Pillow's filter: 2 bilinear, 3 bicubic
    rescale: float = 1 / 255
    mean: tuple[float, float, float] = HALF
    std: tuple[float, float, float] = HALF

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of what comes out.

        Raises:
          DataError: they differ between images.
        """
        if self.crop:
            return self.crop
        if isinstance(self.size, tuple):
            return self.size
        raise DataError(
            f"resizing to {self.size!r} without a crop leaves images of other sizes, which make no batch; set size to "
            f"height and width, or do_center_crop, in {FILE}"
        )


def read(path: str | Path) -> Preprocess:
    """Reads `preprocessor_config.json`.

    Args:
      path: the file, or the folder that has it.

    Raises:
      DataError: it is missing, of a kind that is not known, or asks for something that is not done here.
    """
    file = Path(path) / FILE if Path(path).is_dir() else Path(path)
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"{file.parent} has no {file.name}, which says how a model wants images") from error
    except ValueError as error:
        raise DataError(f"{file} is not valid JSON ({error}); download it again") from error
    try:
        return parse(config)
    except DataError as error:
        raise DataError(f"{file}: {error}") from error


def parse(config: Mapping[str, Any]) -> Preprocess:
    """Reads the keys of a `preprocessor_config.json`, of any age.

    Raises:
      DataError: see `read`.

    Example:
      >>> parse({"feature_extractor_type": "CLIPFeatureExtractor", "size": 224, "crop_size": 224}).shape
      (224, 224)
      >>> parse({"image_processor_type": "ConvNextImageProcessor", "size": 224})[:2]
      (256, (224, 224))
    """
    named = config.get("image_processor_type") or config.get("feature_extractor_type") or ""
    kind = named.removesuffix("Fast").removesuffix("Pil").replace("FeatureExtractor", "ImageProcessor")
    if kind not in KINDS:
        raise DataError(f"image_processor_type {named!r} is not supported; supported are {', '.join(KINDS)}")
    for key, value in config.items():
        if key not in READ | NEUTRAL and value not in (None, False):
            raise DataError(f"{key!r} is {value!r}, which is not done here")
    own = KINDS[kind] | {key: value for key, value in config.items() if value is not None}
    size = _size(own["size"], square=own.get("square", True)) if own.get("do_resize", True) else None
    crop = _size(own["crop_size"], square=True) if own.get("do_center_crop", False) and "crop_size" in own else None
    if "crop_pct" in KINDS[kind] and isinstance(size, int):
        # Up to 384 pixels the middle of a larger image, from there on all of it, out of shape.
        size, crop = (int(size / own["crop_pct"]), (size, size)) if size < 384 else ((size, size), crop)
    channels = lambda value: tuple(map(float, value)) if isinstance(value, list | tuple) else (float(value),) * 3
    normal = own.get("do_normalize", True)
    made = Preprocess(
        size,
        crop,  # type: ignore[arg-type]
        int(own["resample"]),
        float(own.get("rescale_factor", 1 / 255)) if own.get("do_rescale", True) else 1.0,
        channels(own["image_mean"]) if normal else (0.0,) * 3,  # type: ignore[arg-type]
        channels(own["image_std"]) if normal else (1.0,) * 3,  # type: ignore[arg-type]
    )
    _ = made.shape
    return made


def _size(value: Any, *, square: bool) -> tuple[int, int] | int:
    """Height and width, or the length of the shorter side."""
    if isinstance(value, int):
        return (value, value) if square else value
    if isinstance(value, list | tuple):
        return int(value[0]), int(value[1])
    if set(value) == {"height", "width"}:
        return int(value["height"]), int(value["width"])
    if set(value) == {"shortest_edge"}:
        return int(value["shortest_edge"])
    raise DataError(f"size {value!r} is not done here; height and width are, and shortest_edge")


def describe(how: Preprocess) -> dict[str, Any]:
    """The keys of a `preprocessor_config.json` that says the same: the inverse of `parse`.

    Example:
      >>> parse(describe(Preprocess(256, (224, 224)))) == Preprocess(256, (224, 224))
      True
    """
    sides = lambda pair: dict(zip(("height", "width"), pair, strict=True))
    given = how.size or how.shape
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": how.size is not None,
        "size": sides(given) if isinstance(given, tuple) else {"shortest_edge": given},
        "resample": how.resample,
        "do_center_crop": how.crop is not None,
        "crop_size": sides(how.crop or how.shape),
        "do_rescale": True,
        "rescale_factor": how.rescale,
        "do_normalize": True,
        "image_mean": list(how.mean),
        "image_std": list(how.std),
        "do_convert_rgb": True,
    }


def at(how: Preprocess, side: int) -> Preprocess:
    """The same for squares of another side; what is resized before a crop grows along.

    Example:
      >>> at(Preprocess(256, (224, 224)), 448)[:2]
      (512, (448, 448))
    """
    if how.crop is None:
        return how._replace(size=(side, side))
    grow = lambda n, old: round(n * side / old)
    if isinstance(how.size, tuple):
        size = grow(how.size[0], how.crop[0]), grow(how.size[1], how.crop[1])
    else:
        size = how.size and grow(how.size, min(how.crop))
    return how._replace(size=size, crop=(side, side))


def apply(how: Preprocess, image: Image.Image) -> UInt8[np.ndarray, "H W 3"]:
    """Resizes an RGB image and takes its middle.

    Where it is smaller than the middle that is wanted, it is surrounded with zeros, as in transformers.

    Example:
      >>> apply(Preprocess(4, (4, 4)), Image.new("RGB", (8, 16), (1, 2, 3))).shape
      (4, 4, 3)
    """
    width, height = image.size
    if isinstance(how.size, int):
        short, long = sorted(image.size)
        sides = how.size, int(how.size * long / short)
        height, width = sides if height < width else sides[::-1]
    elif how.size:
        height, width = how.size
    # Nothing is read in a coarser way (Pillow's `draft`), which would be other pixels.
    resized = image if how.size is None else image.resize((width, height), Image.Resampling(how.resample))
    pixels = np.asarray(resized)
    return pixels if how.crop is None else _middle(pixels, how.crop)


def _middle(pixels: np.ndarray, crop: tuple[int, int]) -> np.ndarray:
    around = [max(0, want - have) for want, have in zip(crop, pixels.shape[:2], strict=True)]
    if any(around):
        edges = [(math.ceil(n / 2), n - math.ceil(n / 2)) for n in around]
        pixels = np.pad(pixels, [*edges, (0, 0)])
    top, left = ((have - want) // 2 for want, have in zip(crop, pixels.shape[:2], strict=True))
    return pixels[top : top + crop[0], left : left + crop[1]]


def normalise(how: Preprocess, pixels: Array) -> Float[Array, "B H W 3"]:
    """8-bit pixels, or float ones from 0 to 255, as the model reads them.

    Example:
      >>> normalise(Preprocess(), jnp.array([[[[0, 255, 0]]]], jnp.uint8)).tolist()
      [[[[-1.0, 1.0, -1.0]]]]
    """
    mean, std = (jnp.asarray(x, jnp.float32) for x in (how.mean, how.std))
    return (pixels.astype(jnp.float32) * how.rescale - mean) / std
