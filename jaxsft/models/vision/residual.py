"""The residual network: convolutions with batch norms, in stages that halve the image and widen it.

    embed/conv/filters, embed/norm/{scale,bias,running_mean,running_var}
    stage0/0-0/layer0/{conv,norm}/...      the first block of a stage, with a shortcut where its shape changes
    stage0/1-2/layer0/{conv,norm}/...      the blocks behind it, stacked and scanned
    classifier/{kernel,bias}               [D, K]

In training (`learn` with a key) a block whose running statistics all train is normalised by the batch, any other by its
running statistics: so a network that trains in full or from scratch does as torch's, and a frozen stage stays as it is.
The statistics are those of a whole microbatch, over all devices that share it.
Source: He et al. 2015, arXiv:1512.03385; the stride in a bottleneck's 3 x 3 layer: torchvision's, "ResNet v1.5".
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from jaxsft import tree
from jaxsft.models.layers import ACTIVATIONS
from jaxsft.models.model import Model, by_rows, span
from jaxsft.models.remat import rematerialise
from jaxsft.models.vision import classifier
from jaxsft.models.vision.classifier import Pooling
from jaxsft.models.vision.layers import BatchNorm, Conv
from jaxsft.tree import Pattern, Tree
from jaxsft.types import Key

INIT = nn.initializers.variance_scaling(2.0, "fan_out", "normal", in_axis=1, out_axis=0)
STATISTICS = ".*/running_(mean|var)"  # the leaves that follow the data instead of descending a loss
Rows = Bool[Array, "B"] | None


@dataclass(frozen=True)
class ResNetConfig:
    """The numbers that make a checkpoint's architecture; families read them from `config.json`."""

    embedding: int
    widths: tuple[int, ...]  # of the stages
    depths: tuple[int, ...]  # blocks of each
    bottleneck: bool = True  # three layers a block, the inner two a quarter as wide; else two
    stride_first: bool = False  # a bottleneck halves the image in its first layer, not the second
    halve_first: bool = False  # the first stage halves the image, too
    channels: int = 3
    labels: int = 0
    pooling: Pooling = "mean"
    activation: str = "relu"
    # A config.json does not say what images it is for; any will do.
    image_size: ClassVar[int] = 224
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


class Unit(nn.Module):
    """A convolution, its norm, and what bends the result."""

    features: int
    size: int
    stride: int = 1
    activation: str | None = None
    follow: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "B H W I"], rows: Rows) -> tuple[Float[Array, "B h w O"], Float[Array, ""]]:
        x = Conv(self.features, self.size, self.stride, use_bias=False, start=INIT, name="conv")(x)
        x, drift = BatchNorm(self.follow, name="norm")(x, rows)
        return (x if self.activation is None else ACTIVATIONS[self.activation](x)), drift


class Block(nn.Module):
    """act(layers(x) + x), with a convolution on the shortcut where the shape changes."""

    config: ResNetConfig
    width: int
    stride: int = 1
    follow: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "B H W I"], rows: Rows) -> tuple[Float[Array, "B h w O"], Float[Array, ""]]:
        c, s = self.config, self.stride
        # transformers bends the inner layers by ReLU, whatever hidden_act says.
        if c.bottleneck:
            inner, (first, second) = self.width // 4, (s, 1) if c.stride_first else (1, s)
            layers = [(inner, 1, first, "relu"), (inner, 3, second, "relu"), (self.width, 1, 1, None)]
        else:
            layers = [(self.width, 3, s, "relu"), (self.width, 3, 1, None)]
        y, total = x, jnp.float32(0)
        for i, (features, size, stride, activation) in enumerate(layers):
            y, drift = Unit(features, size, stride, activation, self.follow, name=f"layer{i}")(y, rows)
            total += drift
        if s != 1 or x.shape[-1] != self.width:
            x, drift = Unit(self.width, 1, s, None, self.follow, name="shortcut")(x, rows)
            total += drift
        return ACTIVATIONS[c.activation](x + y), total


def _stages(config: ResNetConfig) -> list[tuple[int, int, int]]:
    """Width, depth and stride of each stage."""
    strides = [2 if config.halve_first else 1, *[2] * (len(config.widths) - 1)]
    return list(zip(config.widths, config.depths, strides, strict=True))


def _stem(config: ResNetConfig, follow: bool = False) -> Unit:
    return Unit(config.embedding, 7, 2, config.activation, follow)


def _init(config: ResNetConfig, key: Key) -> Tree:
    c, width = config, config.embedding
    key_stem, key_head, *keys = jax.random.split(key, 2 + len(c.widths))
    image = lambda channels: jnp.zeros((1, 8, 8, channels))
    params = {"embed": _stem(c).init(key_stem, image(c.channels), None)["params"]}
    for i, (wide, depth, stride) in enumerate(_stages(c)):
        key_first, *rest = jax.random.split(keys[i], depth)
        one = lambda key, wide=wide: Block(c, wide).init(key, image(wide), None)["params"]
        first = Block(c, wide, stride).init(key_first, image(width), None)["params"]
        params[f"stage{i}"] = {"0-0": jax.tree.map(lambda x: x[None], first)}
        if rest:
            params[f"stage{i}"][f"1-{depth - 1}"] = jax.vmap(one)(jnp.stack(rest))
        width = wide
    return params | classifier.init(c, key_head)


def max_pool(x: Float[Array, "B H W C"]) -> Float[Array, "B h w C"]:
    """The largest of 3 x 3 neighbours, every other row and column."""
    least = np.array(-np.inf, x.dtype)  # a constant, or it would not be known for a maximum and have no gradient
    edges = ((0, 0), (1, 1), (1, 1), (0, 0))
    return jax.lax.reduce_window(x, least, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), edges)


def build(
    config: ResNetConfig,
    *,
    dtype: jax.typing.DTypeLike = jnp.float32,
    remat: str = "dots",
    lora_dropout: float = 0.0,
    mesh: Mesh | None = None,
    follows: Pattern = (),
) -> Model:
    """Makes the functions of a model; arguments as for `decoder.build`. Convolutions take no LoRA, nor its dropout.

    Args:
      follows: the addresses ("params/...") that train. Running statistics among them follow the batches: the second
        thing that `learn` gives is 0 and has their gradient, to be added to the mean loss; `optim` descends it.

    Returns:
      the model. With a key, in training, `features` and `learn` take `segments` [B, 1] for which rows are real.

    Raises:
      ValueError: an unknown remat policy.

    Example:
      >>> model = build(ResNetConfig(8, (8, 16), (1, 2), labels=3))
      >>> params = jax.eval_shape(model.init, jax.random.key(0))
      >>> images = jax.ShapeDtypeStruct((5, 32, 48, 3), jnp.float32)
      >>> jax.eval_shape(model.features, {"params": params}, images).shape
      (5, 1, 17)
    """
    again = rematerialise(remat)

    def trains(at: str, params: Mapping) -> bool:
        moving = [path for path in tree.flat(params) if tree.matches(STATISTICS, path)]
        return all(tree.matches(follows, f"params/{at}/{path}") for path in moving)

    def run(module: Any, params: Mapping, x: Array, rows: Rows) -> tuple[Array, Array]:
        return again(lambda x, params: module.apply({"params": params}, x, rows))(x, params)

    def learn(variables, pixels, positions=None, segments=None, dropout=None, reads=None):
        params, training = variables["params"], dropout is not None
        classifier.expect_pixels(pixels, config.channels, reads)
        rows = None if segments is None else segments[:, 0] > 0
        stem = _stem(config, training and trains("embed", params["embed"]))
        x, total = run(stem, params["embed"], by_rows(pixels.astype(dtype), mesh), rows)
        x = max_pool(x)
        for i, (width, _, stride) in enumerate(_stages(config)):
            for name, stack in sorted(params[f"stage{i}"].items(), key=lambda item: span(item[0]).start):
                follow = training and trains(f"stage{i}/{name}", stack)
                block = Block(config, width, stride if span(name).start == 0 else 1, follow)

                def layer(carry, weights, block=block):
                    x, drift = run(block, weights, carry[0], rows)
                    return (x, carry[1] + drift), None

                (x, total), _ = (
                    jax.lax.scan(layer, (x, total), stack)
                    if len(span(name)) > 1
                    else layer((x, total), jax.tree.map(lambda leaf: leaf[0], stack))
                )
        if config.pooling == "none":
            return x.reshape(len(x), -1, config.hidden), total
        mean = x.astype(jnp.float32).mean(axis=(1, 2)).astype(dtype)
        return classifier.as_token(config, mean), total

    def features(*args, **more):
        return learn(*args, **more)[0]

    output, never = functools.partial(classifier.table, config), classifier.no_cache
    return Model(config, functools.partial(_init, config), features, learn, output, never, never, never)
