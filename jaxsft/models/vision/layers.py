"""Layers of images: convolution, and the norms that come with it; the others are those of `models.layers`.

A convolution's weights are the leaf `filters`, [out, in, height, width] as in Hugging Face's files, and no `kernel`:
adapters and packing are for matrices, and pass it by.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxsft.models.remat import dear


class Conv(nn.Module):
    """A convolution over [B, H, W, C], with `filters` [out, in / groups, size, size] and maybe a bias.

    Cross-correlation, as in torch; padding is size // 2 on each side, or none where `padded` is false.
    """

    features: int
    size: int
    stride: int = 1
    groups: int = 1
    use_bias: bool = True
    padded: bool = True
    start: nn.initializers.Initializer = nn.initializers.truncated_normal(0.02)

    @nn.compact
    def __call__(self, x: Float[Array, "B H W I"]) -> Float[Array, "B h w O"]:
        pad = self.size // 2 if self.padded else 0
        shape = (self.features, x.shape[-1] // self.groups, self.size, self.size)
        y = jax.lax.conv_general_dilated(
            x,
            self.param("filters", self.start, shape).astype(x.dtype),
            (self.stride,) * 2,
            [(pad, pad)] * 2,
            dimension_numbers=("NHWC", "OIHW", "NHWC"),
            feature_group_count=self.groups,
        )
        if self.use_bias:
            y = y + self.param("bias", nn.initializers.zeros, (self.features,)).astype(x.dtype)
        return dear(y)


class Gain(nn.Module):
    """Features times a learned factor each: LayerScale (Touvron et al. 2021, arXiv:2103.17239, eq. 4)."""

    start: float = 1.0

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        return x * self.param("scale", nn.initializers.constant(self.start), (x.shape[-1],)).astype(x.dtype)


class BatchNorm(nn.Module):
    """(x - mean) / deviation * scale + bias of each channel, in float32 (Ioffe and Szegedy 2015, arXiv:1502.03167).

    Mean and variance are the leaves `running_mean` and `running_var`. Where they `follow`, x is normalised by those of
    the batch instead, as in torch's training, and `drift` says where the leaves are to go: it is 0, and its gradient by
    them is what they have above the batch's (the variance unbiased), so that plain gradient descent at the rate 0.1,
    torch's momentum, makes torch's running averages of them. Nothing is written while the network is computed.

        x [B, H, W, C], rows [B]    the batch's statistics are over all pixels of the rows that are real
    """

    follow: bool = False
    eps: float = 1e-5

    @nn.compact
    def __call__(
        self, x: Float[Array, "B H W C"], rows: Bool[Array, "B"] | None = None
    ) -> tuple[Float[Array, "B H W C"], Float[Array, ""]]:
        width = (x.shape[-1],)
        ones, zeros = nn.initializers.ones, nn.initializers.zeros
        starts = {"scale": ones, "bias": zeros, "running_mean": zeros, "running_var": ones}
        scale, bias, mean, var = (self.param(name, start, width).astype(jnp.float32) for name, start in starts.items())
        full, drift = x.astype(jnp.float32), jnp.float32(0)
        if self.follow:
            weights = jnp.ones(len(x)) if rows is None else rows.astype(jnp.float32)
            pixels = weights[:, None, None, None]
            count = jnp.maximum(weights.sum() * x.shape[1] * x.shape[2], 1)
            over = lambda y: (y * pixels).sum(axis=(0, 1, 2)) / count
            now_mean = over(full)
            now_var = over(jnp.square(full - now_mean))
            unbiased = now_var * count / jnp.maximum(count - 1, 1)
            away = jnp.square(mean - jax.lax.stop_gradient(now_mean)).sum()
            away = (away + jnp.square(var - jax.lax.stop_gradient(unbiased)).sum()) / 2
            drift, mean, var = away - jax.lax.stop_gradient(away), now_mean, now_var
        y = (full - mean) * jax.lax.rsqrt(var + self.eps) * scale + bias
        return y.astype(x.dtype), drift


class ResponseNorm(nn.Module):
    """Each channel weighed by its share of the image's response (Woo et al. 2023, arXiv:2301.00808, algorithm 1)."""

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        shape = (1, 1, 1, x.shape[-1])  # as in the files
        scale, bias = (self.param(name, nn.initializers.zeros, shape).astype(jnp.float32) for name in ("scale", "bias"))
        full = x.astype(jnp.float32)
        squares = jnp.square(full).sum(axis=(1, 2), keepdims=True)
        response = jnp.sqrt(jnp.maximum(squares, jnp.finfo(jnp.float32).tiny))  # the root of 0 has no gradient
        share = response / (response.mean(axis=-1, keepdims=True) + 1e-6)
        return (scale * (full * share) + bias + full).astype(x.dtype)
