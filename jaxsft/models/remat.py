"""Rematerialisation: what the backward pass finds kept of the forward pass, and what it computes again.

Layers say which of their results are dear, those of matrix products and of attention; a policy says what becomes of
them, and of what goes into each layer. All else is cheap, and is computed again under every policy but "none".

Source: Chen et al. 2016, arXiv:1604.06174; offloading: Rajbhandari et al. 2021, arXiv:2104.07857, section 5.
"""

from collections.abc import Callable

import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

from jaxsft import narrow

DEAR, INPUT = "dear", "input"  # what costs much to compute, and what goes into a layer

POLICIES: dict[str, Callable | None] = {
    "none": None,  # all is kept
    "dots": jax.checkpoint_policies.save_only_these_names(DEAR),
    "block": jax.checkpoint_policies.nothing_saveable,  # but what went into the layer
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[INPUT],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


def dear(x: Array) -> Array:
    """Says that a result costs much to compute: the policy "dots" keeps it."""
    return narrow.moved(lambda x: checkpoint_name(x, DEAR), x)


def rematerialise(policy: str) -> Callable[[Callable], Callable]:
    """Makes of a layer (x, ...) -> ... one that follows the policy in the backward pass; x is what went into it.

    Raises:
      ValueError: an unknown policy.

    Example:
      >>> import jax.numpy as jnp
      >>> again = rematerialise("block")
      >>> float(jax.grad(again(lambda x, power: jnp.sin(x) ** power))(0.0, 1))
      1.0
    """
    if policy not in POLICIES:
        raise ValueError(f"remat policy {policy!r} is not known; known are {', '.join(POLICIES)}")
    if policy == "none":
        return lambda layer: layer
    named = lambda layer: lambda x, *more: layer(checkpoint_name(x, INPUT), *more)
    return lambda layer: jax.checkpoint(named(layer), policy=POLICIES[policy])
