"""The layers every family is made of: Dense (with its adapter), RMSNorm, the gated MLP.

A kernel is always two-dimensional, [in, out], so that LoRA, weight names and sharding rules stay uniform.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxsft.models import adapter

ACTIVATIONS: dict[str, Callable] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}


class Dense(nn.Module):
    """y = x W + bias, with what an adapter in the collection "lora" adds to x W (see `adapter.project`)."""

    features: int
    use_bias: bool = False
    lora_dropout: float = 0.0  # on the adapter's input; active when the rng "dropout" is given
    init: Callable = nn.initializers.normal(0.02)

    @nn.compact
    def __call__(self, x: Float[Array, "B T I"]) -> Float[Array, "B T O"]:
        *rows, width = x.shape
        x = x.reshape(-1, width)  # the gradients of A and B are plain matrix products then: on a CPU twice as fast
        kernel = self.param("kernel", self.init, (width, self.features)).astype(x.dtype)
        drop = adapter.dropout(self.lora_dropout, self.make_rng("dropout") if self.has_rng("dropout") else None)
        y = adapter.project(x, kernel, self.variables.get("lora", {}), drop)
        if self.use_bias:
            y = y + self.param("bias", nn.initializers.zeros, (self.features,)).astype(x.dtype)
        return y.reshape(*rows, self.features)


class RMSNorm(nn.Module):
    """x / rms(x) * scale, in float32 (Zhang and Sennrich 2019, arXiv:1910.07467, eq. 4).

    With `from_zero` the weight is what scale has above 1, as Gemma's checkpoints store it.
    """

    eps: float
    from_zero: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        start = nn.initializers.zeros if self.from_zero else nn.initializers.ones
        scale = self.param("scale", start, (x.shape[-1],))
        full = x.astype(jnp.float32)
        full = full * jax.lax.rsqrt(jnp.mean(full * full, axis=-1, keepdims=True) + self.eps)
        if self.from_zero:  # Gemma multiplies before it rounds
            return (full * (1 + scale.astype(jnp.float32))).astype(x.dtype)
        # Rounded to the compute dtype before the scale, as the reference models do.
        return full.astype(x.dtype) * scale.astype(x.dtype)


class GatedMLP(nn.Module):
    """down(act(gate x) * up x) (Shazeer 2020, arXiv:2002.05202, eq. 6)."""

    hidden: int
    activation: str
    use_bias: bool
    lora_dropout: float
    out_init: Callable

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        gate = Dense(self.hidden, self.use_bias, self.lora_dropout, name="gate")(x)
        up = Dense(self.hidden, self.use_bias, self.lora_dropout, name="up")(x)
        act = ACTIVATIONS[self.activation]
        return Dense(x.shape[-1], self.use_bias, self.lora_dropout, self.out_init, name="down")(act(gate) * up)
