"""What a model is to everyone else: pure functions, a cache, and layers in stacks whose names say which they are.

A key under `blocks` names the layers it stacks. `split` cuts a stack in two ("0-5" and "6-7"), and then the two parts
can differ in what trains: the backward pass ends at the first part that trains anything.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from jaxsft import axes, narrow
from jaxsft.tree import Tree
from jaxsft.types import Key

if TYPE_CHECKING:
    from jaxsft.models.family import ModelConfig


class Cache(NamedTuple):
    """Keys and values of what was read so far; slot s of a row holds its token at position s.

    They lie as they are multiplied, each with what it is not summed over at its end: otherwise a CPU copies the whole
    cache for every token, and is six times as slow.
    """

    k: Float[Array, "L B K H S"]
    v: Float[Array, "L B K S H"]


class Model(NamedTuple):
    """A model as pure functions, in the manner of `optax.GradientTransformation`.

    variables is {"params": ..., "lora": ..., "packed": ...}: the second only with an adapter, the third only where
    kernels are packed (`quant`) instead of being parameters. Where an adapter is on the output layer, features and
    table are wider than D by its rank (see `adapter.widen`). `reads` is, for rows of pairs, the segment that each token
    sees beside its own (`types.reads`). `read` gives features and a cache with a slot for each place of a row.
    A model of images takes pixels [B, H, W, C], normalised, where tokens stand, and gives a vector [B, 1, D] an image.
    """

    config: "ModelConfig"
    init: Callable[[Key], Tree]  # key -> params
    features: Callable[..., Float[Array, "B T D"]]  # (variables, tokens, positions, segments, dropout=None, reads=None)
    # likewise, and what training adds to the mean loss: `moe.balance`, the drift of `vision.layers.BatchNorm`; else 0
    learn: Callable[..., tuple[Float[Array, "B T D"], Float[Array, ""]]]
    output: Callable[[Mapping], Float[Array, "V D"]]  # variables -> the table that makes logits of features, or raises
    read: Callable[..., tuple[Float[Array, "B T D"], Cache]]  # (variables, tokens, positions, segments)
    extend: Callable[..., tuple[Float[Array, "B T D"], Cache]]  # (variables, tokens, positions, cache), see `write`
    cache: Callable[[int, int], Cache]  # (rows, slots) -> empty
    attention: str = ""  # what computes it, for people
    mesh: Mesh | None = None  # where it runs


def write(
    cache: Cache, k: Float[Array, "L B T K H"], v: Float[Array, "L B T K H"], positions: Int[Array, "B T"]
) -> Cache:
    """Puts the keys and values of tokens into the slots of their positions.

    Example:
      >>> new = jnp.ones((1, 1, 1, 1, 2))
      >>> write(Cache(jnp.zeros((1, 1, 1, 2, 3)), jnp.zeros((1, 1, 1, 3, 2))), new, new, jnp.array([[1]])).v[0, 0, 0]
      Array([[0., 0.],
             [1., 1.],
             [0., 0.]], dtype=float32)
    """
    rows = jnp.arange(len(positions))[:, None]
    first = lambda x: jnp.moveaxis(x, 0, 2)  # B T L K H
    put_k = lambda old, new: old.at[:, rows, :, :, positions].set(new)
    put_v = lambda old, new: old.at[:, rows, :, positions].set(new)
    return Cache(narrow.moved(put_k, cache.k, first(k)), narrow.moved(put_v, cache.v, first(v)))


def logits(model: Model, variables: Mapping, features: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
    """Scores of every token, in float32. For training use `losses.logprobs`, which never keeps all of them."""
    table, cap = model.output(variables).astype(features.dtype), model.config.logit_soft_cap
    scores = jnp.einsum("btd,vd->btv", features, table, preferred_element_type=jnp.float32) * model.config.logit_scale
    return scores if cap is None else cap * jnp.tanh(scores / cap)


def span(name: str) -> range:
    """The layers that a stack holds, from its name.

    Example:
      >>> span("6-7")
      range(6, 8)
    """
    first, last = name.split("-")
    return range(int(first), int(last) + 1)


def split(params: Tree, at: int) -> Tree:
    """Cuts the stack of layers before layer `at`, so that lower and upper layers can differ in what trains.

    Args:
      params: the parameters, or shapes of them; or another tree of stacks beside them, such as packed kernels.
      at: the first layer of the upper part.

    Returns:
      params with one more stack; unchanged where a stack already begins there.

    Raises:
      ValueError: no such layer.

    Example:
      >>> list(split({"blocks": {"0-3": {"w": jnp.zeros((4, 2))}}}, 3)["blocks"])
      ['0-2', '3-3']
    """
    stacks = {}
    total = max(span(name).stop for name in params["blocks"])
    if not 0 <= at <= total:
        raise ValueError(f"cannot cut before layer {at}; the model has layers 0 to {total - 1}")
    for name, stack in params["blocks"].items():
        layers = span(name)
        if layers.start < at < layers.stop:
            cut = at - layers.start
            stacks[f"{layers.start}-{at - 1}"] = jax.tree.map(lambda x, cut=cut: x[:cut], stack)
            stacks[f"{at}-{layers.stop - 1}"] = jax.tree.map(lambda x, cut=cut: x[cut:], stack)
        else:
            stacks[name] = stack
    return {**params, "blocks": stacks}


def by_rows(x: Float[Array, "B ..."], mesh: Mesh | None) -> Float[Array, "B ..."]:
    """Says that activations are cut as the batch is; the cut of the embedding's features would spread otherwise.

    The tokens of rows, [B, T, D], are cut over `context` besides.
    """
    if mesh is None or mesh.size == 1 or len(x) % axes.rows(mesh):
        return x
    piece = [axes.CONTEXT] if x.ndim == 3 and x.shape[1] % mesh.shape[axes.CONTEXT] == 0 else []
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(axes.ROWS, *piece)))
