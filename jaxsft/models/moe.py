"""The mixture of experts: a router sends each token to a few of many MLPs, and weighs what they answer.

The products are in experts.py.
Source: Shazeer et al. 2017, arXiv:1701.06538, eq. 1 to 5; Jiang et al. 2024, arXiv:2401.04088, section 2.1.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from jaxsft.models import experts
from jaxsft.models.layers import ACTIVATIONS, Dense, GatedMLP


@dataclass(frozen=True)
class MoE:
    """The numbers that make a mixture."""

    experts: int
    active: int  # experts that a token meets
    hidden: int  # units of each expert
    normalised: bool = True  # the weights of a token's experts sum to 1
    shared: int = 0  # units of the MLP that every token meets besides (Qwen 2)
    dense: tuple[int, ...] = ()  # layers that have a plain MLP instead
    balance: float = 0.0  # coefficient of the load-balancing loss in training
    kind: Literal["gated", "clamped"] = "gated"  # clamped: gpt-oss's, with biases, gate and up interleaved in a kernel
    limit: float = 7.0  # clamped only: the largest gate and up
    alpha: float = 1.702  # clamped only: the gain in the sigmoid


class Routing(NamedTuple):
    """How a layer's tokens spread over its experts."""

    load: Float[Array, "E"]  # choices that fall on each expert, a token; they sum to `active`
    share: Float[Array, "E"]  # the mean probability that the router gives each


def balance(routing: Routing) -> Float[Array, ""]:
    """E sum_e load_e share_e: `active` where tokens spread evenly over the experts, more where they crowd.

    Args:
      routing: with layers in front, [L, E]; they are averaged before the product, as transformers does.

    Source: Fedus et al. 2021, Switch Transformers, arXiv:2101.03961, eq. 4 to 6.

    Example:
      >>> even = jnp.full((2, 4), 0.25)
      >>> float(balance(Routing(even, even)))
      1.0
    """
    load, share = routing
    return load.shape[-1] * jnp.sum(load.mean(axis=0) * share.mean(axis=0))


class Bank(nn.Module):
    """The leaves of one product of all experts: kernel, packed or not, bias, and what the adapter has for it."""

    experts: int
    width: int
    features: int
    use_bias: bool
    init: Callable

    @nn.compact
    def __call__(self) -> dict[str, Any]:
        leaves: dict[str, Any] = {"packed": dict(self.variables["packed"])} if "packed" in self.variables else {}
        if not leaves:
            leaves = {"kernel": self.param("kernel", self.init, (self.experts, self.width, self.features))}
        if self.use_bias:
            leaves["bias"] = self.param("bias", nn.initializers.zeros, (self.experts, self.features))
        return leaves | dict(self.variables.get("lora", {}))


class Experts(nn.Module):
    """The banks of a mixture, by name; widths are {name: (in, out)}."""

    experts: int
    widths: Mapping[str, tuple[int, int]]
    use_bias: bool
    out_init: Callable

    @nn.compact
    def __call__(self) -> dict[str, dict[str, Any]]:
        usual = nn.initializers.normal(0.02)
        start = lambda name: self.out_init if name == "down" else usual
        bank = lambda name, width, features: Bank(
            self.experts, width, features, self.use_bias, start(name), name=name
        )()
        return {name: bank(name, *sizes) for name, sizes in self.widths.items()}


class Mixture(nn.Module):
    """A block's mixture of experts, shared out over the devices of `mesh` where there are several."""

    config: MoE
    activation: str
    lora_dropout: float
    out_init: Callable
    mesh: Mesh | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], real: Bool[Array, "B T"]) -> tuple[Float[Array, "B T D"], Routing]:
        c, D = self.config, x.shape[-1]
        clamped = c.kind == "clamped"
        scores = Dense(c.experts, clamped, self.lora_dropout, name="router")(x).astype(jnp.float32)
        odds = jax.nn.softmax(scores, axis=-1)
        weights, chosen = jax.lax.top_k(scores if clamped else odds, c.active)
        if clamped:
            weights = jax.nn.softmax(weights, axis=-1)
        elif c.normalised:
            weights = weights / weights.sum(axis=-1, keepdims=True)
        into = {"gate_up": (D, 2 * c.hidden)} if clamped else {"gate": (D, c.hidden), "up": (D, c.hidden)}
        banks = Experts(c.experts, {**into, "down": (c.hidden, D)}, clamped, self.out_init, name="experts")()
        key = self.make_rng("dropout") if self.lora_dropout and self.has_rng("dropout") else None
        dropout = (self.lora_dropout, key)
        y = experts.spread(self.mesh, x, chosen, weights, banks, self._act(), dropout)
        if c.shared:
            mlp = GatedMLP(c.shared, self.activation, False, self.lora_dropout, self.out_init, name="shared")
            y = y + jax.nn.sigmoid(Dense(1, False, self.lora_dropout, name="shared_gate")(x)) * mlp(x)
        counts = real[..., None] / jnp.maximum(real.sum(), 1)
        load = jax.nn.one_hot(chosen, c.experts).sum(axis=-2)
        return y, Routing((load * counts).sum(axis=(0, 1)), (odds * counts).sum(axis=(0, 1)))

    def _act(self) -> Callable[[Mapping[str, Array]], Array]:
        c, act = self.config, ACTIVATIONS[self.activation]
        if c.kind == "gated":
            return lambda results: act(results["gate"]) * results["up"]

        def clamped(results):
            gate, up = results["gate_up"][..., ::2], results["gate_up"][..., 1::2]
            gate, up = jnp.minimum(gate, c.limit), jnp.clip(up, -c.limit, c.limit)
            return (up + 1) * gate * jax.nn.sigmoid(c.alpha * gate)

        return clamped
