"""The losses of preferences by name, and weighted sums of them. Names are those of TRL's loss_type.

    (pairs: Scored, *, beta=0.1, ...) -> (losses [N], {metric: [N]})

A loss is a mean over the pairs of a step. Three sets say what it needs for that: no reference, all pairs at once, or
the number of chosen tokens a pair.
"""

import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from jaxtyping import Array, Float

from jaxsft.losses import absolute, aot, dpo, orpo
from jaxsft.losses.scored import Losses, Scored

__all__ = ["COUNTED", "COUPLED", "PREFERENCE", "WITHOUT_REFERENCE", "Scored", "weighted"]

PREFERENCE: dict[str, Callable[..., Losses]] = {
    "sigmoid": dpo.sigmoid,
    "sigmoid_norm": dpo.sigmoid_norm,
    "hinge": dpo.hinge,
    "ipo": dpo.ipo,
    "robust": dpo.robust,
    "exo_pair": dpo.exo_pair,
    "discopop": dpo.discopop,
    "nca_pair": absolute.nca_pair,
    "bco_pair": absolute.bco_pair,
    "sppo_hard": absolute.sppo_hard,
    "apo_zero": absolute.apo_zero,
    "apo_down": absolute.apo_down,
    "aot": aot.aot,
    "aot_unpaired": aot.aot_unpaired,
    "sft": orpo.sft,
    "orpo": orpo.orpo,
    "simpo": orpo.simpo,
    "alphapo": orpo.alphapo,
    "cpo": orpo.cpo,
}
WITHOUT_REFERENCE = frozenset({"sft", "orpo", "simpo", "alphapo", "cpo"})  # ref_chosen and ref_rejected may be zeros
COUPLED = frozenset({"aot", "aot_unpaired"})  # the loss of a pair depends on all pairs of the step
COUNTED = frozenset({"sft", "orpo", "cpo"})  # take `mean_count`, the chosen tokens a pair of the step


def weighted(terms: Mapping[str, float], **options: Any) -> Callable[..., Losses]:
    """The weighted sum of several losses, each with those of the options that it takes.

    Args:
      terms: name of a loss, of PREFERENCE, to its weight: {"sigmoid": 1.0, "sft": 0.2}.
      options: beta, label_smoothing, ..., of the losses.

    Returns:
      (pairs, *, mean_count=None) -> (losses [N], metrics [N]): the sum, with the metrics of all terms; those of the
      same name, such as the rewards, are of the first term that is not `sft`.

    Raises:
      ValueError: no term; no such loss; an option that no term takes; a divergence that a term beside `sft` lacks.

    Example:
      >>> import jax.numpy as jnp
      >>> zeros, ones = jnp.zeros(1), jnp.ones(1)
      >>> loss = weighted({"sigmoid": 1.0, "sft": 0.5}, beta=0.2)
      >>> losses, metrics = loss(Scored(-ones, -ones, -ones, -ones, ones, ones, ones > 0))
      >>> round(float(losses[0]), 4)  # log 2 + 1/2
      1.1931
      >>> weighted({"sigmiod": 1.0})
      Traceback (most recent call last):
      ValueError: there is no preference loss 'sigmiod'; did you mean sigmoid? ...
    """
    if not terms:
        raise ValueError(f"a preference loss needs a term, such as sigmoid: 1.0; there are {', '.join(PREFERENCE)}")
    for name in terms:
        if name not in PREFERENCE:
            near = difflib.get_close_matches(name, PREFERENCE, n=1)
            guess = f"did you mean {near[0]}? " if near else ""
            raise ValueError(f"there is no preference loss '{name}'; {guess}There are {', '.join(PREFERENCE)}")
    taken = {name: _options(PREFERENCE[name]) for name in terms}
    every = sorted(set().union(*taken.values()))
    if stray := sorted(set(options) - set(every)):
        raise ValueError(f"{', '.join(terms)} takes no {', '.join(stray)}; there are {', '.join(every)}")
    lacking = [name for name in terms if name != "sft" and "divergence" not in taken[name]]
    if lacking and options.get("divergence", "reverse_kl") != "reverse_kl":
        able = [name for name, loss in PREFERENCE.items() if "divergence" in _options(loss)]
        raise ValueError(
            f"divergence is {options['divergence']}, and {', '.join(lacking)} knows reverse_kl alone: leave the option "
            f"out, or choose among {', '.join(able)}, which look at the difference of two rewards"
        )

    def loss(pairs: Scored, *, mean_count: Float[Array, ""] | float | None = None) -> Losses:
        total, metrics = None, {}
        for name in sorted(terms, key="sft".__eq__):  # the others first, in their order
            given = {key: value for key, value in options.items() if key in taken[name]}
            given |= {"mean_count": mean_count} if name in COUNTED else {}
            losses, own = PREFERENCE[name](pairs, **given)
            total = terms[name] * losses if total is None else total + terms[name] * losses
            metrics = own | metrics
        return total, metrics  # type: ignore[return-value]

    return loss


def _options(loss: Callable[..., Losses]) -> set[str]:
    """What a configuration can say of a loss; `mean_count` belongs to each step."""
    return set(inspect.signature(loss).parameters) - {"pairs", "mean_count"}
