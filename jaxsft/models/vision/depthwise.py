"""ConvNeXt's network: blocks of a depthwise convolution and an MLP over channels, in stages that halve the image.

    embed/{conv,norm}/...                           patches
    stage1/halve/{norm,conv}/...                    what halves the image, of all stages but the first
    stage0/0-2/{conv,norm,up,down}/...              a stage's blocks, stacked and scanned
    norm/{scale,bias}                               of the mean over the last image
    classifier/{kernel,bias}                        [D, K]

up and down are linear layers, which LoRA can adapt. Left out: stochastic depth.
Source: Liu et al. 2022, arXiv:2201.03545; the second version: Woo et al. 2023, arXiv:2301.00808.
"""

import functools
from dataclasses import dataclass
from typing import ClassVar, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from jaxsft import narrow
from jaxsft.models.layers import ACTIVATIONS, Dense, LayerNorm
from jaxsft.models.model import Model, by_rows, span
from jaxsft.models.remat import rematerialise
from jaxsft.models.vision import classifier
from jaxsft.models.vision.classifier import Pooling
from jaxsft.models.vision.layers import Conv, Gain, ResponseNorm
from jaxsft.tree import Tree
from jaxsft.types import Key

EPS = 1e-6  # of all norms but the last


@dataclass(frozen=True)
class ConvNextConfig:
    """The numbers that make a checkpoint's architecture; families read them from `config.json`."""

    widths: tuple[int, ...]  # of the stages
    depths: tuple[int, ...]  # blocks of each
    patch: int = 4
    image_size: int = 224  # what the checkpoint was made for; others will do
    channels: int = 3
    labels: int = 0
    pooling: Pooling = "mean"
    gain: float | None = 1e-6  # what a block's gains begin at; None without them
    response: bool = False  # the second version's norm inside the MLP
    norm_eps: float = 1e-12  # of the last norm
    activation: str = "gelu"
    layers: ClassVar[int] = 0  # that are alike over the whole network, for `models.split`
    # Of the scores, as a decoder's.
    tied: ClassVar[bool] = False
    logit_scale: ClassVar[float] = 1.0
    logit_soft_cap: ClassVar[float | None] = None

    def __post_init__(self):
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation {self.activation!r} is not known; known are {', '.join(ACTIVATIONS)}")
        if len(self.widths) != len(self.depths):
            raise ValueError(f"{len(self.widths)} widths and {len(self.depths)} depths; each stage has one of both")
        if self.pooling not in ("mean", "none"):
            raise ValueError(f"pooling {self.pooling!r} needs a class token, which no convolution has; take mean")

    @property
    def hidden(self) -> int:
        return self.widths[-1]


class Embed(nn.Module):
    """Patches, and their norm."""

    config: ConvNextConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
        c = self.config
        x = Conv(c.widths[0], c.patch, c.patch, padded=False, name="conv")(x)
        return LayerNorm(EPS, name="norm")(x)


class Halve(nn.Module):
    """Half the rows and columns, at another width."""

    width: int

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
        return Conv(self.width, 2, 2, padded=False, name="conv")(LayerNorm(EPS, name="norm")(x))


class Block(nn.Module):
    config: ConvNextConfig
    lora_dropout: float = 0.0

    @nn.compact
    def __call__(self, x: Float[Array, "B H W D"]) -> Float[Array, "B H W D"]:
        c, D = self.config, x.shape[-1]
        y = LayerNorm(EPS, name="norm")(Conv(D, 7, groups=D, name="conv")(x))
        y = ACTIVATIONS[c.activation](Dense(4 * D, True, self.lora_dropout, name="up")(y))
        y = ResponseNorm(name="response")(y) if c.response else y
        y = Dense(D, True, self.lora_dropout, name="down")(y)
        return x + (y if c.gain is None else Gain(c.gain, name="gain")(y))


def _init(config: ConvNextConfig, key: Key) -> Tree:
    c = config
    key_embed, key_head, *keys = jax.random.split(key, 2 + len(c.widths))
    image = lambda channels, side=2: jnp.zeros((1, side, side, channels))
    params = {"embed": Embed(c).init(key_embed, image(c.channels, c.patch))["params"]}
    for i, (width, depth) in enumerate(zip(c.widths, c.depths, strict=True)):
        key_down, key_blocks = jax.random.split(keys[i])
        one = lambda key, width=width: Block(c).init(key, image(width))["params"]
        params[f"stage{i}"] = {f"0-{depth - 1}": jax.vmap(one)(jax.random.split(key_blocks, depth))}
        if i:
            params[f"stage{i}"]["halve"] = Halve(width).init(key_down, image(c.widths[i - 1]))["params"]
    norm = {"scale": jnp.ones(c.hidden), "bias": jnp.zeros(c.hidden)}
    return params | {"norm": norm} | classifier.init(c, key_head)


def build(
    config: ConvNextConfig,
    *,
    dtype: jax.typing.DTypeLike = jnp.float32,
    remat: str = "dots",
    lora_dropout: float = 0.0,
    mesh: Mesh | None = None,
) -> Model:
    """Makes the functions of a model; arguments as for `decoder.build`.

    Raises:
      ValueError: an unknown remat policy.

    Example:
      >>> model = build(ConvNextConfig((8, 16), (1, 2), labels=3))
      >>> params = jax.eval_shape(model.init, jax.random.key(0))
      >>> images = jax.ShapeDtypeStruct((5, 32, 48, 3), jnp.float32)
      >>> jax.eval_shape(model.features, {"params": params}, images).shape
      (5, 1, 17)
    """
    again = rematerialise(remat)
    block, norm = Block(config, lora_dropout), LayerNorm(config.norm_eps)

    def layer(x, inputs):
        weights, key = inputs
        return cast(Array, block.apply(weights, x, rngs=None if key is None else {"dropout": key})), None

    def features(variables, pixels, positions=None, segments=None, dropout=None, reads=None):
        params = variables["params"]
        classifier.expect_pixels(pixels, config.channels, reads)
        x = cast(Array, Embed(config).apply({"params": params["embed"]}, by_rows(pixels.astype(dtype), mesh)))
        for i, width in enumerate(config.widths):
            stage, low = params[f"stage{i}"], variables.get("lora", {}).get(f"stage{i}", {})
            if i:
                x = cast(Array, Halve(width).apply({"params": stage["halve"]}, x))
            stacks = [name for name in stage if name != "halve"]
            for name in sorted(stacks, key=lambda name: span(name).start):
                weights = {"params": stage[name]} | ({"lora": low[name]} if name in low else {})
                key = None if dropout is None else jax.random.fold_in(jax.random.fold_in(dropout, i), span(name).start)
                keys = None if key is None else jax.random.split(key, len(span(name)))
                x, _ = narrow.scan(layer, x, (weights, keys), again)
        if config.pooling == "none":
            return x.reshape(len(x), -1, config.hidden)
        mean = x.astype(jnp.float32).mean(axis=(1, 2))
        return classifier.as_token(config, cast(Array, norm.apply({"params": params["norm"]}, mean)).astype(dtype))

    def learn(*args, **more):
        return features(*args, **more), jnp.float32(0)

    output, never = functools.partial(classifier.table, config), classifier.no_cache
    return Model(config, functools.partial(_init, config), features, learn, output, never, never, never)
