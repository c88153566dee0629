"""The mixture of experts: a router sends each token to a few of many MLPs, and weighs what they answer.

Tokens are sorted by expert, so that each expert meets its own in one piece, and `jax.lax.ragged_dot` multiplies all
pieces with their kernels. No token is dropped and none is padded.

Kernels have an expert axis in front, [E, in, out]. On a mesh the axis "tensor" shares the experts out: each device
routes its own tokens, computes what its own experts say of them, and the answers are summed over that axis.
Source: Shazeer et al. 2017, arXiv:1701.06538, eq. 1 to 5; Jiang et al. 2024, arXiv:2401.04088, section 2.1.
"""

import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from jaxsft import quant
from jaxsft.models import adapter
from jaxsft.models.layers import ACTIVATIONS, Dense, GatedMLP
from jaxsft.models.remat import dear
from jaxsft.types import Key

ROWS, EXPERTS = ("data", "fsdp"), "tensor"  # the mesh axes that share out tokens and experts


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


@jax.checkpoint  # what the backward pass keeps is the codes
def _packed(x: Array, packed: Mapping[str, Array], sizes: Array) -> Array:
    return jax.lax.ragged_dot(x, quant.unpack(packed, x.dtype), sizes)


def _product(
    x: Float[Array, "M I"], bank: Mapping[str, Any], sizes: Int[Array, "E"], drop: adapter.Drop | None = None
) -> Float[Array, "M O"]:
    """x W_e + bias_e + scale_e (x A_e) B_e for the rows of each expert e, which lie in order and number sizes[e].

    Rows behind the last expert's are 0, and so are their gradients.
    """
    if "m" in bank:
        raise ValueError("DoRA is not supported for experts; leave them out of tuning.lora.targets")
    leaf, ours = lambda name: bank[name].astype(x.dtype), (jnp.arange(x.shape[0]) < sizes.sum())[:, None]
    x = jnp.where(ours, x, 0)  # what ragged_dot leaves behind its groups is not said
    y = _packed(x, bank["packed"], sizes) if "packed" in bank else jax.lax.ragged_dot(x, leaf("kernel"), sizes)
    if "bias" in bank:
        y = y + jnp.repeat(leaf("bias"), sizes, axis=0, total_repeat_length=x.shape[0])
    if "a" in bank:
        through = lambda x, a, b: jax.lax.ragged_dot(jax.lax.ragged_dot(x, leaf(a) * scale, sizes), leaf(b), sizes)
        scale = leaf("scale")[:, None, None]
        y = y + through(x if drop is None else drop(x), "a", "b")
        y = y - through(x, "a0", "b0") if "a0" in bank else y
    return dear(jnp.where(ours, y, 0))


def _count(banks: Any) -> int:
    return jax.tree.leaves(banks)[0].shape[0]  # every leaf has the experts in front


def mixture(
    x: Float[Array, "N D"],
    chosen: Int[Array, "N K"],
    weights: Float[Array, "N K"],
    banks: Mapping[str, Mapping[str, Any]],
    act: Callable[[Mapping[str, Array]], Array],
    first: Int[Array, ""] | int = 0,
    drop: Callable[[str], adapter.Drop | None] = lambda name: None,
) -> Float[Array, "N D"]:
    """sum_k weights[k] expert_chosen[k](x), over the experts that `banks` has: `first` and those after it.

    Args:
      x: tokens.
      chosen: the experts of each.
      weights: of each one's answer.
      banks: the leaves of `Bank` by the product's name; all but "down" read the token.
      act: {name: result of a product of the token} -> what "down" reads.
      first: the number of the first expert here; the answers of experts elsewhere count as 0.
      drop: a product's name -> dropout on the input of its adapter.
    """
    N, K = chosen.shape
    E = _count(banks)
    here = chosen.reshape(-1) - first
    here = jnp.where((here >= 0) & (here < E), here, E)  # what is elsewhere sorts behind
    order = jnp.argsort(here, stable=True)
    sizes = jnp.bincount(here, length=E).astype(jnp.int32)  # leaves the E-th out
    rows = x[order // K]
    hidden = act({name: _product(rows, bank, sizes, drop(name)) for name, bank in banks.items() if name != "down"})
    y = _product(hidden, banks["down"], sizes, drop("down"))
    y = y.astype(jnp.float32) * weights.reshape(-1)[order][:, None].astype(jnp.float32)
    back = jnp.argsort(order)
    return y[back].reshape(N, K, -1).sum(axis=1).astype(x.dtype)


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
        c, (B, T, D) = self.config, x.shape
        clamped = c.kind == "clamped"
        tokens = x.reshape(B * T, D)
        scores = Dense(c.experts, clamped, self.lora_dropout, name="router")(x).reshape(B * T, -1).astype(jnp.float32)
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
        y = _spread(self.mesh, tokens, chosen, weights, banks, self._act(), dropout).reshape(x.shape)
        if c.shared:
            mlp = GatedMLP(c.shared, self.activation, False, self.lora_dropout, self.out_init, name="shared")
            y = y + jax.nn.sigmoid(Dense(1, False, self.lora_dropout, name="shared_gate")(x)) * mlp(x)
        counts = real.reshape(-1, 1) / jnp.maximum(real.sum(), 1)
        load = jax.nn.one_hot(chosen, c.experts).sum(axis=1)
        return y, Routing((load * counts).sum(axis=0), (odds * counts).sum(axis=0))

    def _act(self) -> Callable[[Mapping[str, Array]], Array]:
        c, act = self.config, ACTIVATIONS[self.activation]
        if c.kind == "gated":
            return lambda results: act(results["gate"]) * results["up"]

        def clamped(results):
            gate, up = results["gate_up"][..., ::2], results["gate_up"][..., 1::2]
            gate, up = jnp.minimum(gate, c.limit), jnp.clip(up, -c.limit, c.limit)
            return (up + 1) * gate * jax.nn.sigmoid(c.alpha * gate)

        return clamped


def _spread(
    mesh: Mesh | None,
    x: Array,
    chosen: Array,
    weights: Array,
    banks: Any,
    act: Callable,
    dropout: tuple[float, Key | None] = (0.0, None),
) -> Array:
    """`mixture` with tokens shared out over `ROWS` and experts over `EXPERTS`, as far as the numbers divide."""
    rate, key = dropout

    def drops(key: Key | None) -> Callable[[str], adapter.Drop | None]:
        own = lambda name: None if key is None else jax.random.fold_in(key, zlib.crc32(name.encode()))
        return lambda name: adapter.dropout(rate, own(name))

    if mesh is None or mesh.size == 1 or len(x) % math.prod(mesh.shape[axis] for axis in ROWS):
        return mixture(x, chosen, weights, banks, act, drop=drops(key))
    cut = EXPERTS if _count(banks) % mesh.shape[EXPERTS] == 0 else None

    def own(x, chosen, weights, banks, key):
        if key is not None:
            key = jax.random.fold_in(key, jax.lax.axis_index(ROWS if cut is None else (*ROWS, EXPERTS)))
        if cut is None:
            return mixture(x, chosen, weights, banks, act, drop=drops(key))
        first = jax.lax.axis_index(EXPERTS) * _count(banks)
        # Each device's experts pull on the same tokens: said here, or the gradients of those are not summed.
        x, weights = (jax.lax.pcast(part, EXPERTS, to="varying") for part in (x, weights))
        return jax.lax.psum(mixture(x, chosen, weights, banks, act, first, drops(key)), EXPERTS)

    rows = PartitionSpec(ROWS, None)
    spec = jax.tree.map(lambda leaf: PartitionSpec(cut, *[None] * (leaf.ndim - 1)), banks)
    shared = jax.shard_map(own, mesh=mesh, in_specs=(rows, rows, rows, spec, PartitionSpec()), out_specs=rows)
    return shared(x, chosen, weights, banks, key)
