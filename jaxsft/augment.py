"""Pictures changed while they are learned, so that a model does not learn by heart what does not matter.

    one picture          crop and resize, mirror, some changes of colour, erase a rectangle
    two pictures         mixup: shares of both; cutmix: a rectangle of the other; the target is shared out likewise

All of it runs on the device, on a whole batch inside the compiled step, before the batch is cut into microbatches.
What is random of a row hangs on its key alone, and that on the row's place in the stream: neither devices, microbatches
nor a continuation change it. A row's partner is the one that mirrors it in the batch, as in timm. Rotation, shear and
blurring are left out: fine-tuning gains little by them.

Sources: crops, Szegedy et al. 2014, arXiv:1409.4842, section 6; colours, Cubuk et al. 2019, RandAugment,
arXiv:1909.13719; mixup, Zhang et al. 2017, arXiv:1710.09412; CutMix, Yun et al. 2019, arXiv:1905.04899; erasing, Zhong
et al. 2017, arXiv:1708.04896.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8

from jaxsft.types import Images, Key

Picture = Float[Array, "H W C"]  # from 0 to 255
GREY = (0.299, 0.587, 0.114)  # of ITU-R 601, as Pillow makes grey of RGB
EXACT = jax.lax.Precision.HIGHEST


@dataclass(frozen=True)
class Config:
    """How pictures are changed while they are learned; nothing of it when they are measured."""

    crop: float = 0.5
    """the smallest share of a picture's area that a random crop keeps, before it is resized to the whole; 1 for none.
    Training from scratch takes 0.08; fine-tuning wants more of the picture to be seen"""
    ratio: float = 4 / 3
    """the most that a crop is wider than high, or higher than wide"""
    flip: float = 0.5
    """the probability of a mirror image; 0 where left and right mean something, as in digits and text"""
    colours: int = 0
    """changes of colour, one after the other, each drawn anew: brightness, contrast, saturation, posterize, solarize,
    autocontrast; 2 is RandAugment's"""
    strength: float = 0.3
    """how strong a change of colour may be, 0 to 1; RandAugment's 9 of 30"""
    erase: float = 0.0
    """the probability that a rectangle, 2 to 33 % of the picture, becomes the mean colour; 0.25 is usual"""
    mixup: float = 0.0
    """a of the Beta(a, a) that says how two pictures are mixed; 0 for none, 0.2 to 0.8 is usual, with many epochs"""
    cutmix: float = 0.0
    """a of the Beta(a, a) that says how much of another picture is put in; 0 for none, 1 is usual; where mixup is given
    too, either is as likely"""
    label_smoothing: float = 0.0
    """the share of the target that all classes get alike, 0.1 is usual; of the loss, as torch has it"""

    def __post_init__(self) -> None:
        shares = {"crop": self.crop, "flip": self.flip, "strength": self.strength, "erase": self.erase}
        for name, value in (shares | {"label_smoothing": self.label_smoothing}).items():
            if not 0 <= value <= 1:
                raise ValueError(f"augment.{name} is {value}; it must be 0 to 1")
        if self.crop == 0 or self.ratio < 1:
            raise ValueError(f"augment.crop is {self.crop}, above 0, and augment.ratio {self.ratio}, at least 1")
        if min(self.mixup, self.cutmix, self.colours) < 0:
            raise ValueError("augment.mixup, augment.cutmix and augment.colours must not be negative; 0 is none")


NONE = Config(crop=1.0, flip=0.0)


def apply(config: Config, batch: Images, key: Key, *, classes: int, normalise: Callable[[Array], Array]) -> Images:
    """Changes a whole batch.

    Args:
      config: how.
      batch: 8-bit pixels.
      key: of the run; each row folds in its turn.
      classes: K.
      normalise: pixels 0 to 255 -> what the model reads.

    Returns:
      the batch with float32 pixels, and with targets [B, K] whose rows sum to 1.

    Example:
      >>> column = lambda *values: jnp.array(values)[:, None]
      >>> black, white = jnp.zeros((4, 4, 3), jnp.uint8), jnp.full((4, 4, 3), 255, jnp.uint8)
      >>> batch = Images(jnp.stack([black, white]), column(0, 1), column(0, 1), column(0, 1))
      >>> mixed = apply(Config(mixup=1.0), batch, jax.random.key(0), classes=2, normalise=lambda x: x / 255)
      >>> bool(jnp.allclose(mixed.pixels.mean((1, 2, 3)), mixed.targets[:, 1]))  # as much of white as of class 1
      True
    """
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, batch.turn[:, 0])
    one, two = jnp.moveaxis(jax.vmap(functools.partial(jax.random.split, num=2))(keys), 1, 0)
    pixels = jax.vmap(functools.partial(alone, config, normalise=normalise))(one, batch.pixels)
    targets = jax.nn.one_hot(batch.label[:, 0], classes, dtype=jnp.float32)
    if config.mixup or config.cutmix:
        real = batch.row[:, 0] >= 0
        pixels, targets = mixed(two, pixels, targets, real, mixup=config.mixup, cutmix=config.cutmix)
    return batch._replace(pixels=pixels, targets=targets)


def alone(config: Config, key: Key, pixels: UInt8[Array, "H W C"], *, normalise: Callable[[Array], Array]) -> Picture:
    """Changes one picture by itself, and normalises it."""
    key_crop, key_flip, key_colour, key_erase = jax.random.split(key, 4)
    picture = pixels.astype(jnp.float32)
    if config.crop < 1:
        size = (pixels.shape[0], pixels.shape[1])
        picture = cropped(picture, draw_box(key_crop, size, area=(config.crop, 1.0), ratio=config.ratio))
    if config.flip:
        picture = jnp.where(jax.random.bernoulli(key_flip, config.flip), picture[:, ::-1], picture)
    for each in jax.random.split(key_colour, config.colours) if config.colours else ():
        picture = coloured(each, picture, config.strength)
    picture = normalise(picture)
    return erased(key_erase, picture, config.erase) if config.erase else picture


# ---- rectangles -----------------------------------------------------------------------------------------------------

Box = tuple[Int[Array, ""], Int[Array, ""], Int[Array, ""], Int[Array, ""]]  # top, left, height, width


def draw_box(key: Key, size: tuple[int, int], *, area: tuple[float, float], ratio: float) -> Box:
    """Draws a rectangle: its share of the area uniform, the log of its ratio uniform, its place uniform.

    One that is wider or higher than the picture is cut to it, where torchvision draws again up to ten times.
    """
    key_area, key_ratio, key_top, key_left = jax.random.split(key, 4)
    share = jax.random.uniform(key_area, minval=area[0], maxval=area[1]) * size[0] * size[1]
    skew = jnp.exp(jax.random.uniform(key_ratio, minval=-math.log(ratio), maxval=math.log(ratio)))
    cut = lambda side, most: jnp.clip(jnp.round(side), 1, most).astype(jnp.int32)
    high, wide = cut(jnp.sqrt(share / skew), size[0]), cut(jnp.sqrt(share * skew), size[1])
    place = lambda key, side, most: jax.random.randint(key, (), 0, most - side + 1)
    return place(key_top, high, size[0]), place(key_left, wide, size[1]), high, wide


def cropped(picture: Picture, box: Box) -> Picture:
    """A rectangle of a picture, resized to the size of the whole, bilinear as in torchvision's `resized_crop`.

    Example:
      >>> ramp = jnp.arange(4.0)[None, :, None] * jnp.ones((4, 1, 1))
      >>> cropped(ramp, (0, 1, 4, 2))[0, :, 0].tolist()
      [1.0, 1.25, 1.75, 2.0]
    """
    top, left, high, wide = box
    rows, columns = _reads(picture.shape[0], top, high), _reads(picture.shape[1], left, wide)
    return jnp.einsum("hi,ijc,wj->hwc", rows, picture, columns, precision=EXACT)


def _reads(size: int, start: Array, length: Array) -> Float[Array, "size size"]:
    """How much each output pixel reads of each input pixel of a part, along one side."""
    at = (jnp.arange(size) + 0.5) * length / size - 0.5
    at = start + jnp.clip(at, 0, length - 1)
    return jnp.maximum(0.0, 1.0 - jnp.abs(at[:, None] - jnp.arange(size)))


def inside(size: tuple[int, int], box: Box) -> Bool[Array, "H W"]:
    """Which pixels a rectangle covers.

    Example:
      >>> inside((2, 3), (jnp.int32(0), jnp.int32(1), jnp.int32(1), jnp.int32(2))).astype(int).tolist()
      [[0, 1, 1], [0, 0, 0]]
    """
    top, left, high, wide = box
    row, column = jnp.arange(size[0])[:, None], jnp.arange(size[1])[None]
    return (row >= top) & (row < top + high) & (column >= left) & (column < left + wide)


def erased(key: Key, picture: Picture, probability: float) -> Picture:
    """Puts 0, the mean colour of a normalised picture, into a random rectangle of 2 to 33 % of it."""
    key_whether, key_box = jax.random.split(key)
    size = (picture.shape[0], picture.shape[1])
    gone = inside(size, draw_box(key_box, size, area=(0.02, 1 / 3), ratio=10 / 3))
    return jnp.where(jax.random.bernoulli(key_whether, probability) & gone[..., None], 0.0, picture)


# ---- colours --------------------------------------------------------------------------------------------------------


def grey(picture: Picture) -> Float[Array, "H W 1"]:
    """The lightness that people see."""
    return jnp.einsum("hwc,c->hw", picture, jnp.array(GREY), precision=EXACT)[..., None]


def _blend(picture: Picture, other: Array, factor: Array) -> Picture:
    """`other` where the factor is 0, the picture where it is 1, more than the picture beyond."""
    return jnp.clip(other + factor * (picture - other), 0, 255)


def brightness(picture: Picture, factor: Array) -> Picture:
    """Factor times the picture."""
    return _blend(picture, jnp.zeros_like(picture), factor)


def contrast(picture: Picture, factor: Array) -> Picture:
    """Away from the mean lightness, or towards it."""
    return _blend(picture, grey(picture).mean(), factor)


def saturation(picture: Picture, factor: Array) -> Picture:
    """Away from grey, or towards it."""
    return _blend(picture, grey(picture), factor)


def posterize(picture: Picture, bits: Array) -> Picture:
    """Keeps the upper bits of 8.

    Example:
      >>> posterize(jnp.array([[[255.0, 100.0, 3.0]]]), 4).ravel().tolist()
      [240.0, 96.0, 0.0]
    """
    step = 2.0 ** (8 - bits)
    return jnp.floor(jnp.round(picture) / step) * step


def solarize(picture: Picture, threshold: Array) -> Picture:
    """Turns round what is at least as light as the threshold.

    Example:
      >>> solarize(jnp.array([[[255.0, 100.0, 3.0]]]), 100).ravel().tolist()
      [0.0, 155.0, 3.0]
    """
    return jnp.where(picture >= threshold, 255 - picture, picture)


def autocontrast(picture: Picture) -> Picture:
    """Stretches each colour to 0 to 255; one that is the same everywhere stays."""
    low, high = picture.min((0, 1)), picture.max((0, 1))
    stretched = (picture - low) * 255 / jnp.maximum(high - low, 1e-6)
    return jnp.where(high > low, jnp.clip(stretched, 0, 255), picture)


def coloured(key: Key, picture: Picture, strength: float) -> Picture:
    """One change of colour, drawn, as strong as drawn up to `strength`."""
    key_which, key_strength, key_sign = jax.random.split(key, 3)
    much = strength * jax.random.uniform(key_strength)
    factor = 1 + 0.9 * much * jax.random.rademacher(key_sign, ())
    changes = [
        lambda x: brightness(x, factor),
        lambda x: contrast(x, factor),
        lambda x: saturation(x, factor),
        lambda x: posterize(x, 8 - jnp.round(4 * much)),
        lambda x: solarize(x, 256 * (1 - much)),
        autocontrast,
    ]
    return jax.lax.switch(jax.random.randint(key_which, (), 0, len(changes)), changes, picture)


# ---- two pictures ---------------------------------------------------------------------------------------------------


def mixed(
    keys: Key,
    pixels: Float[Array, "B H W C"],
    targets: Float[Array, "B K"],
    real: Bool[Array, "B"],
    *,
    mixup: float = 0.0,
    cutmix: float = 0.0,
) -> tuple[Float[Array, "B H W C"], Float[Array, "B K"]]:
    """Mixes each picture with the one that mirrors it in the batch; rows that only fill it up are left out.

    Args:
      keys: one a row.
      pixels: normalised.
      targets: of the pictures.
      real: False where a row only fills up the batch.
      mixup, cutmix: see `Config`; one of them is above 0.
    """
    size = (pixels.shape[1], pixels.shape[2])
    partners = real & real[::-1]

    def shares(key: Key) -> Float[Array, "H W"]:
        """How much of each pixel stays."""
        key_which, key_up, key_cut, key_box = jax.random.split(key, 4)
        stays = jax.random.beta(key_up, mixup, mixup) if mixup else 1.0
        whole = jnp.full(size, stays)
        if not cutmix:
            return whole
        cut = jnp.where(cut_box(key_box, size, 1 - jax.random.beta(key_cut, cutmix, cutmix)), 0.0, 1.0)
        return jnp.where(jax.random.bernoulli(key_which, 0.5 if mixup else 1.0), cut, whole)

    stays = jnp.where(partners[:, None, None], jax.vmap(shares)(keys), 1.0)[..., None]
    mean = stays.mean((1, 2))  # what a rectangle that reaches over the edge really covers
    return stays * pixels + (1 - stays) * pixels[::-1], mean * targets + (1 - mean) * targets[::-1]


def cut_box(key: Key, size: tuple[int, int], area: Array) -> Bool[Array, "H W"]:
    """The rectangle of CutMix: of the picture's form, its middle anywhere, cut off at the edges."""
    key_row, key_column = jax.random.split(key)

    def along(key: Key, most: int) -> Bool[Array, "most"]:
        middle, half = jax.random.randint(key, (), 0, most), jnp.sqrt(area) * most / 2
        at = jnp.arange(most)
        return (at >= jnp.round(middle - half)) & (at < jnp.round(middle + half))

    return along(key_row, size[0])[:, None] & along(key_column, size[1])[None]
