"""Images as transformers' own processors make them: the same crops, the same 8-bit pixels, the same float32."""

from importlib import import_module
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaxsft.data import pixels

pytestmark = pytest.mark.parity
FLOWERS = Path(__file__).parents[3] / "shared" / "data" / "img_flowers"
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
KINDS = {
    "vit": ("vit", "ViT", {}),
    "vit, bicubic, not square": ("vit", "ViT", {"resample": 3, "size": {"height": 64, "width": 96}}),
    "deit": ("deit", "DeiT", {}),
    "clip": ("clip", "CLIP", {}),
    "siglip": ("siglip", "Siglip", {}),
    "convnext, cropped": ("convnext", "ConvNext", {"size": {"shortest_edge": 224}}),
    "convnext, large": ("convnext", "ConvNext", {}),
    "dinov2": ("bit", "Bit", {"size": {"shortest_edge": 256}, **IMAGENET}),
    "a crop beyond the image": (
        "bit",
        "Bit",
        {"size": {"shortest_edge": 40}, "crop_size": {"height": 64, "width": 64}},
    ),
}


def images() -> list[Image.Image]:
    """Noise of uneven sizes, wide and high, and some photographs where they are."""
    draw = np.random.default_rng(0)
    shapes = [(37, 91), (200, 123), (301, 300)]
    made = [Image.fromarray(draw.integers(0, 256, (*shape, 3), np.uint8)) for shape in shapes]
    return made + [Image.open(file).convert("RGB") for file in sorted(FLOWERS.glob("*/*.jpg"))[::12]]


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_are_those_of_transformers_processor(kind):
    module, name, given = KINDS[kind]
    made = import_module(f"transformers.models.{module}.image_processing_pil_{module}")
    processor = getattr(made, f"{name}ImageProcessorPil")(**given)
    how = pixels.parse(processor.to_dict())
    for image in images():
        plain = processor(image, return_tensors="np", do_rescale=False, do_normalize=False).pixel_values[0]
        ours = pixels.apply(how, image)
        assert ours.shape == plain.transpose(1, 2, 0).shape
        np.testing.assert_array_equal(ours, plain.transpose(1, 2, 0))
        wanted = processor(image, return_tensors="np").pixel_values[0].transpose(1, 2, 0)
        np.testing.assert_allclose(np.asarray(pixels.normalise(how, jnp.asarray(ours))), wanted, atol=2e-6)
