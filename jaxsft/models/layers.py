"""The layers every family is made of: Dense (with its adapter), the norms, the MLPs.

A kernel is always two-dimensional, [in, out], so that LoRA, weight names and sharding rules stay uniform.
"""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxsft.models import adapter
from jaxsft.models.remat import dear


def _in_full(f: Callable) -> Callable:
    """The function in float32, rounded once to the dtype of its argument, as torch computes it."""
    return lambda x: f(x.astype(jnp.float32)).astype(x.dtype)


FUNCTIONS: dict[str, Callable] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
}
ACTIVATIONS = {name: _in_full(f) for name, f in FUNCTIONS.items()}


class Dense(nn.Module):
    """y = x W + bias, with what an adapter in the collection "lora" adds to x W (see `adapter.project`).

    W is the parameter "kernel", or what the collection "packed" has for this layer.
    """

    features: int
    use_bias: bool = False
    lora_dropout: float = 0.0  # on the adapter's input; active when the rng "dropout" is given
    init: Callable = nn.initializers.normal(0.02)

    @nn.compact
    def __call__(self, x: Float[Array, "B T I"], inner: Float[Array, "N R"] | None = None) -> Float[Array, "B T O"]:
        *rows, width = x.shape
        x = x.reshape(-1, width)  # the gradients of A and B are plain matrix products then: on a CPU twice as fast
        kernel = self.variables.get("packed") or self.param("kernel", self.init, (width, self.features)).astype(x.dtype)
        drop = adapter.dropout(self.lora_dropout, self.make_rng("dropout") if self.has_rng("dropout") else None)
        y = adapter.project(x, kernel, self.variables.get("lora", {}), drop, inner)
        if self.use_bias:
            y = y + self.param("bias", nn.initializers.zeros, (self.features,)).astype(x.dtype)
        return dear(y.reshape(*rows, self.features))


def fan_out(
    module: nn.Module, x: Float[Array, "B T I"], features: Mapping[str, int], use_bias: bool, **more: Any
) -> list[Float[Array, "B T O"]]:
    """Several `Dense` of a module over one input, by name; their adapters meet it in one product.

    Args:
      module: the one that calls, with `lora_dropout`.
      x: the input.
      features: the width of each one's result.
      use_bias, more: of each, see `Dense`.
    """
    rate, found = module.lora_dropout, module.variables.get("lora", {})  # type: ignore[attr-defined]
    apart = rate and module.has_rng("dropout")  # each drops other numbers of the input
    lora = {} if apart else {name: found[name] for name in features if "a" in found.get(name, {})}
    inners = adapter.inners(x.reshape(-1, x.shape[-1]), lora)
    dense = lambda name, width: Dense(width, use_bias, rate, name=name, **more)(x, inners.get(name))
    return [dense(name, width) for name, width in features.items()]


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


class LayerNorm(nn.Module):
    """(x - mean) / deviation * scale + bias, in float32, rounded once (Ba et al. 2016, arXiv:1607.06450, eq. 4)."""

    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],)).astype(jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],)).astype(jnp.float32)
        full = x.astype(jnp.float32)
        full = full - jnp.mean(full, axis=-1, keepdims=True)
        full = full * jax.lax.rsqrt(jnp.mean(full * full, axis=-1, keepdims=True) + self.eps)
        return (full * scale + bias).astype(x.dtype)


class MLP(nn.Module):
    """down(act(up x)), the two-layer network of Vaswani et al. 2017, arXiv:1706.03762, eq. 2."""

    hidden: int
    activation: str
    use_bias: bool
    lora_dropout: float
    out_init: Callable

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        up = ACTIVATIONS[self.activation](Dense(self.hidden, self.use_bias, self.lora_dropout, name="up")(x))
        return Dense(x.shape[-1], self.use_bias, self.lora_dropout, self.out_init, name="down")(up)


class GatedMLP(nn.Module):
    """down(act(gate x) * up x) (Shazeer 2020, arXiv:2002.05202, eq. 6).

    `fused`: gate and up are one kernel [D, 2 hidden], "gate_up", as in Phi 3's checkpoints.
    """

    hidden: int
    activation: str
    use_bias: bool
    lora_dropout: float
    out_init: Callable
    fused: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        if self.fused:
            (both,) = fan_out(self, x, {"gate_up": 2 * self.hidden}, self.use_bias)
            gate, up = jnp.split(both, 2, axis=-1)
        else:
            gate, up = fan_out(self, x, {"gate": self.hidden, "up": self.hidden}, self.use_bias)
        act = ACTIVATIONS[self.activation]
        return Dense(x.shape[-1], self.use_bias, self.lora_dropout, self.out_init, name="down")(act(gate) * up)
