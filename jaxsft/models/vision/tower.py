"""The one vision transformer: patches, tokens beside them, pre-norm blocks of attention, scanned over layers.

Parameters are a nested dict, with the stacks of layers that `decoder` describes:

    embed/patch/filters         [D, C, P, P]   a patch's features, embed/patch/bias [D]
    embed/cls, distillation, registers         tokens in front of the patches, those that a family has
    embed/positions             [1, T, D]      of the class token (and of the distillation token) and of the patches
    embed/norm/{scale,bias}                    CLIP alone
    blocks/0-5/attn/q/kernel    [6, D, D]
    norm/{scale,bias}           [D]            all but CLIP
    classifier/{kernel,bias}    [D, K]         see `classifier`

Images of another size than the model's are no error: the positions of the patches are interpolated, as transformers'
`interpolate_pos_encoding` does. Left out: dropout other than LoRA's, stochastic depth, masks, attention pooling.
Source: Dosovitskiy et al. 2020, arXiv:2010.11929, eq. 1 to 4.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from jaxsft import narrow
from jaxsft.models.attention import BOTH_SIDES, Where, attend, choose, describe
from jaxsft.models.layers import ACTIVATIONS, MLP, Dense, GatedMLP, LayerNorm, fan_out
from jaxsft.models.model import Model, by_rows, span
from jaxsft.models.remat import rematerialise
from jaxsft.models.vision import classifier
from jaxsft.models.vision.classifier import Pooling
from jaxsft.models.vision.layers import Conv, Gain
from jaxsft.models.vision.positions import resample
from jaxsft.tree import Tree
from jaxsft.types import Key

INIT = nn.initializers.truncated_normal(0.02)


@dataclass(frozen=True)
class TowerConfig:
    """The numbers that make a checkpoint's architecture; families read them from `config.json`."""

    width: int  # of a token
    mlp_hidden: int
    layers: int
    heads: int
    image_size: int  # pixels of a side, of the images that the positions were learned on
    patch: int  # pixels of a patch's side
    channels: int = 3
    labels: int = 0  # classes; 0 without a classifier
    pooling: Pooling = "cls"
    cls: bool = True  # a token in front of the patches
    distillation: bool = False  # and one behind it (DeiT)
    registers: int = 0  # and so many behind that, which have no position (DINOv2)
    plain: bool = False  # tokens and positions lack the axis of length 1 that ViT's files give them (CLIP, SigLIP)
    patch_bias: bool = True
    qkv_bias: bool = True
    embed_norm: bool = False  # a norm before the first block (CLIP)
    norm: bool = True  # a norm behind the last
    gain: float | None = None  # what a residual's gains begin at; None without them
    gated: bool = False  # the MLP is SwiGLU, gate and up in one kernel (the largest DINOv2)
    antialias: bool = False  # of interpolated positions
    norm_eps: float = 1e-12
    activation: str = "gelu"
    # Of the scores, as a decoder's.
    tied: ClassVar[bool] = False
    logit_scale: ClassVar[float] = 1.0
    logit_soft_cap: ClassVar[float | None] = None

    def __post_init__(self):
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation {self.activation!r} is not known; known are {', '.join(ACTIVATIONS)}")
        if self.width % self.heads:
            raise ValueError(f"{self.heads} heads cannot share {self.width} features; the one must divide the other")
        if self.image_size < self.patch:
            raise ValueError(f"images of {self.image_size} pixels have no patch of {self.patch}")
        if self.pooling.startswith("cls") and not self.cls:
            raise ValueError(f"pooling {self.pooling!r} needs a class token, which this model does not have; take mean")

    @property
    def hidden(self) -> int:
        """Features of an image's vector."""
        return self.width * (2 if self.pooling == "cls+mean" else 1)

    @property
    def placed(self) -> int:
        """Tokens in front of the patches that have a position."""
        return self.cls + self.distillation

    @property
    def grid(self) -> int:
        """Patches of a side, of the images that the positions were learned on."""
        return self.image_size // self.patch


class Attention(nn.Module):
    config: TowerConfig
    lora_dropout: float
    kernel: str
    mesh: Mesh | None

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        (B, T, D), N, bias = x.shape, self.config.heads, self.config.qkv_bias
        q, k, v = (y.reshape(B, T, N, D // N) for y in fan_out(self, x, dict.fromkeys("qkv", D), bias, init=INIT))
        everywhere = Where(jnp.zeros((B, T), jnp.int32), jnp.ones((B, T), jnp.int32))
        out = attend(q, k, v, everywhere, causal=False, kernel=self.kernel, mesh=self.mesh)
        return Dense(D, True, self.lora_dropout, INIT, name="o")(out.reshape(B, T, D))


class Block(nn.Module):
    config: TowerConfig
    lora_dropout: float = 0.0
    kernel: str = "blocks"
    mesh: Mesh | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        c = self.config
        gain = lambda name, y: y if c.gain is None else Gain(c.gain, name=name)(y)
        norm = lambda name: LayerNorm(c.norm_eps, name=name)
        attn = Attention(c, self.lora_dropout, self.kernel, self.mesh, name="attn")
        x = x + gain("attn_gain", attn(norm("attn_norm")(x)))
        if c.gated:
            mlp = GatedMLP(c.mlp_hidden, "silu", True, self.lora_dropout, INIT, fused=True, name="swiglu")
        else:
            mlp = MLP(c.mlp_hidden, c.activation, True, self.lora_dropout, INIT, name="mlp")
        return x + gain("mlp_gain", mlp(norm("mlp_norm")(x)))


def _patches(config: TowerConfig) -> Conv:
    c = config
    return Conv(c.width, c.patch, c.patch, use_bias=c.patch_bias, padded=False, start=INIT)


def _init(config: TowerConfig, key: Key) -> Tree:
    c, keys = config, jax.random.split(key, 4)
    pixels, token = jnp.zeros((1, c.patch, c.patch, c.channels)), jnp.zeros((1, 1, c.width))
    one = lambda key: Block(c).init(key, token)["params"]
    rows = {"positions": c.placed + c.grid**2, "cls": c.cls, "distillation": c.distillation, "registers": c.registers}
    front = () if c.plain else (1,)
    shape = lambda name: (c.width,) if c.plain and name == "cls" else (*front, int(rows[name]), c.width)
    tables = zip(rows, jax.random.split(keys[0], len(rows)), strict=True)
    norm = lambda: {"scale": jnp.ones(c.width), "bias": jnp.zeros(c.width)}
    embed: Tree = {name: INIT(key, shape(name)) for name, key in tables if rows[name]}
    embed |= {"patch": _patches(c).init(keys[1], pixels)["params"]} | ({"norm": norm()} if c.embed_norm else {})
    return {
        "embed": embed,
        "blocks": {f"0-{c.layers - 1}": jax.vmap(one)(jax.random.split(keys[2], c.layers))},
        **({"norm": norm()} if c.norm else {}),
        **classifier.init(c, keys[3]),
    }


def _embed(config: TowerConfig, params: Mapping, pixels: Float[Array, "B H W C"]) -> Float[Array, "B T D"]:
    """Patches and the tokens in front of them, each with its position."""
    c = config
    x = cast(Array, _patches(c).apply({"params": params["patch"]}, pixels))
    (B, *grid, D), row = x.shape, lambda name: params[name].reshape(-1, c.width)
    positions = row("positions").astype(jnp.float32)
    at = resample(positions[c.placed :], (c.grid, c.grid), (grid[0], grid[1]), antialias=c.antialias)
    parts = [x.reshape(B, -1, D) + at.astype(x.dtype)]
    everyone = lambda rows: jnp.broadcast_to(rows.astype(x.dtype), (B, *rows.shape))
    if c.registers:
        parts.insert(0, everyone(row("registers")))
    front = [row(name) for name in ("cls", "distillation") if name in params]
    if front:
        parts.insert(0, everyone(jnp.concatenate(front) + positions[: c.placed]))
    return jnp.concatenate(parts, axis=1)


def _pool(config: TowerConfig, x: Float[Array, "B T D"]) -> Float[Array, "B E"]:
    """An image's vector; means are float32."""
    first = config.placed + config.registers
    # Of DINOv2's patches without registers transformers takes all but the class token, which is the same.
    mean = x[:, first:].astype(jnp.float32).mean(axis=1).astype(x.dtype)
    return {
        "cls": lambda: x[:, 0],
        "mean": lambda: mean,
        "cls+mean": lambda: jnp.concatenate([x[:, 0], mean], axis=-1),
    }[config.pooling]()


def build(
    config: TowerConfig,
    *,
    dtype: jax.typing.DTypeLike = jnp.float32,
    remat: str = "dots",
    lora_dropout: float = 0.0,
    mesh: Mesh | None = None,
    attention: str = "auto",
) -> Model:
    """Makes the functions of a model; arguments as for `decoder.build`.

    `build(dataclasses.replace(config, pooling="none", labels=0))` gives the last hidden states, of the same parameters.

    Returns:
      the model. `read`, `extend` and `cache` raise.

    Raises:
      ValueError: an unknown remat policy, a kernel that attends to one side alone.

    Example:
      >>> model = build(TowerConfig(8, 16, 2, heads=2, image_size=8, patch=4, labels=3))
      >>> params = jax.eval_shape(model.init, jax.random.key(0))
      >>> images = jax.ShapeDtypeStruct((5, 8, 12, 3), jnp.float32)
      >>> jax.eval_shape(model.features, {"params": params}, images).shape
      (5, 1, 9)
    """
    again = rematerialise(remat)
    kernel = choose(attention, {BOTH_SIDES}, mesh)
    block, norm = Block(config, lora_dropout, kernel, mesh), LayerNorm(config.norm_eps)

    def features(variables, pixels, positions=None, segments=None, dropout=None, reads=None):
        params = variables["params"]
        classifier.expect_pixels(pixels, config.channels, reads)

        def layer(x, inputs):
            weights, key = inputs
            rngs = None if key is None else {"dropout": key}
            return cast(Array, block.apply(weights, x, rngs=rngs)), None

        x = by_rows(_embed(config, params["embed"], pixels.astype(dtype)), mesh)
        if config.embed_norm:
            x = cast(Array, norm.apply({"params": params["embed"]["norm"]}, x))
        beside = {kind: variables.get(kind, {}).get("blocks", {}) for kind in ("lora", "packed")}
        for name, stack in sorted(params["blocks"].items(), key=lambda item: span(item[0]).start):
            layers = span(name)
            weights = {"params": stack} | {kind: stacks[name] for kind, stacks in beside.items() if name in stacks}
            keys = None if dropout is None else jax.random.split(jax.random.fold_in(dropout, layers.start), len(layers))
            x, _ = narrow.scan(layer, x, (weights, keys), again)
        if config.norm:
            x = cast(Array, norm.apply({"params": params["norm"]}, x))
        return x if config.pooling == "none" else classifier.as_token(config, _pool(config, x))

    def learn(*args, **more):
        return features(*args, **more), jnp.float32(0)

    output, never = functools.partial(classifier.table, config), classifier.no_cache
    init, said = functools.partial(_init, config), describe(kernel, mesh)
    return Model(config, init, features, learn, output, never, never, never, said)
