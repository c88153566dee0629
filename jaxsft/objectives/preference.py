"""Preference: a policy learns to find one answer likelier than another, compared with the reference it started as.

The reference is the base without its adapter, so LoRA needs one set of weights; where the base's own parameters train,
a copy of those; or its log-probabilities are computed once, before training, and come with the batch. It is run on its
own and not in one batch with the policy: the backward pass would then go through its rows, too.
"""

import functools
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxsft import losses
from jaxsft.losses import Chunk, Scored
from jaxsft.losses.scored import Losses
from jaxsft.models import Model
from jaxsft.objectives.judged import judged
from jaxsft.objectives.language import expect, head_of
from jaxsft.objectives.pairs import (
    Each,
    Found,
    Pairwise,
    Read,
    Reference,
    Whole,
    answers,
    divergence,
    existing,
    mean_count,
    pairwise,
    read,
    reference_logprobs,
    repeated,
    weighed,
)
from jaxsft.types import Key, Pairs


@dataclass(frozen=True)
class Config:
    """What is preferred, and how strongly."""

    loss: str | dict[str, float] = "sigmoid"
    """of pairs: sigmoid (DPO), hinge, ipo, robust, exo_pair, nca_pair, bco_pair, sppo_hard, aot, aot_unpaired,
    apo_zero, apo_down, discopop, sigmoid_norm, sft, orpo, simpo, alphapo, cpo, or a weighted sum such as
    {sigmoid: 1.0, sft: 0.2}; of answers that are wanted or not: kto, apo_zero_unpaired, bco"""
    beta: float | None = None
    """how strongly the policy is held to the reference; by default the loss's own, most often 0.1"""
    label_smoothing: float | None = None
    """the share of pairs that may be labelled the wrong way round (sigmoid: cDPO, robust, exo_pair, cpo, ...)"""
    options: dict[str, Any] = field(default_factory=dict)
    """what else the loss takes, by its keywords: {gamma: 0.5} of simpo, {divergence: js_divergence} of sigmoid"""
    ld_alpha: float | None = None
    """LD-DPO: the weight of an answer's tokens beyond the length of the shorter one"""
    wpo: bool = False
    """WPO: weigh each pair by how likely the policy is to write it"""
    reference: Literal["live", "precomputed"] = "live"
    """live: the reference runs in every step; precomputed: once, before training, and is kept by content"""

    @property
    def terms(self) -> dict[str, float]:
        """The losses by name, with their weights."""
        return {self.loss: 1.0} if isinstance(self.loss, str) else dict(self.loss)

    @property
    def unpaired(self) -> bool:
        return bool(set(self.terms) & set(losses.UNPAIRED))

    @property
    def needs_reference(self) -> Literal["live", "precomputed", "no"]:
        """Whether there is a reference, and when it runs."""
        return self.reference if self.unpaired or set(self.terms) - losses.WITHOUT_REFERENCE else "no"

    @property
    def keywords(self) -> dict[str, Any]:
        """The options that are set."""
        given = {"beta": self.beta, "label_smoothing": self.label_smoothing, **self.options}
        return {name: value for name, value in given.items() if value is not None}


def preference(
    model: Model,
    terms: Mapping[str, float],
    *,
    reference: Reference = "live",
    ld_alpha: float | None = None,
    wpo: bool = False,
    chunk: Chunk | None = None,
    **options: Any,
) -> Pairwise:
    """Losses over pairs, see `losses.PREFERENCE`.

    Args:
      model: a decoder.
      terms: name of a loss to its weight; {"sigmoid": 1.0} is DPO.
      reference: "live" runs it: the base without its adapter, and where the base's parameters train, those that
        `session.with_reference` keeps; without them the policy would be compared with itself. "precomputed"
        takes `Pairs.reference`, see `session.precompute`. Losses that have none ignore both.
      ld_alpha, wpo: see `losses.ld_weights`, `losses.wpo`.
      chunk: as for `supervised`.
      options: of the losses.

    Returns:
      the objective over `Pairs`: the sum over pairs of their losses, and how many there are. Metrics, means over pairs:
      rewards_chosen, rewards_rejected, margin, accuracy, logps_chosen, logps_rejected (of whole answers, in nats), kl
      (see `pairs.divergence`; where the reference runs) and the loss's own.

    Raises:
      ValueError: an encoder, an unknown loss, an option that no loss takes, wpo with a loss that sorts.
    """
    expect("causal", model.config)
    _expect_single(terms, wpo)
    loss = losses.weighted(terms, **options)
    compared = reference if set(terms) - losses.WITHOUT_REFERENCE else None
    look = functools.partial(_look, model, reference=compared, ld_alpha=ld_alpha, wpo=wpo, chunk=chunk)

    def tell(variables: Mapping, whole: Whole, key: Key | None) -> tuple[Each, Array]:
        scored, seen, balance = look(variables, whole.pairs, key)
        if whole.found is None:
            found = loss(scored, **{name: value[0, 0] for name, value in whole.shared.items()})
        else:
            found = _follow(whole.found, scored)
        return _told(*found, seen, whole.pairs), balance

    def prepare(variables: Mapping, batch: Pairs, over: Callable) -> Whole:
        mean = mean_count(batch)
        shared = {"mean_count": repeated(mean, batch)} if set(terms) & losses.COUNTED else {}
        if not set(terms) & losses.COUPLED:
            return Whole(batch, shared, None)
        shape = batch.exists.shape
        scored = over(lambda *piece: jax.tree.map(lambda x: x.reshape(-1, shape[1]), look(*piece)[0]))
        found = _together(functools.partial(loss, mean_count=mean), jax.tree.map(jnp.ravel, scored))
        return Whole(batch, shared, jax.tree.map(lambda x: x.reshape(shape), found))

    needs = set(terms) & (losses.COUPLED | losses.COUNTED)
    return pairwise(tell, model.config.moe, prepare if needs else None)


def _expect_single(terms: Collection[str], wpo: bool) -> None:
    if wpo and (coupled := set(terms) & losses.COUPLED):
        raise ValueError(
            f"preference.wpo weighs single pairs, and {coupled.pop()} sorts all of a step; leave out one of the two"
        )


def _look(
    model: Model,
    variables: Mapping,
    batch: Pairs,
    key: Key | None,
    *,
    reference: Reference | None,
    ld_alpha: float | None,
    wpo: bool,
    chunk: Chunk | None,
) -> tuple[Scored, Each, Float[Array, ""]]:
    """What policy and reference say of each pair: for the loss, for people, and `moe.balance`."""
    policy, seen = read(model, variables, batch, key, chunk), {}
    counts = answers(policy.learned, batch)
    now, then = weighed(policy.logprobs, policy.learned, batch, ld_alpha), jnp.zeros_like(counts)
    if reference == "live":
        old = reference_logprobs(model, variables, batch, chunk)
        then = weighed(old, policy.learned, batch, ld_alpha)
        seen["kl"] = divergence(policy, old, batch)
    elif reference == "precomputed":
        then = batch.reference
    whole = answers(policy.logprobs, batch)
    seen |= {"logps_chosen": whole[..., 0], "logps_rejected": whole[..., 1]}
    if wpo:
        seen["weight"] = _wpo(model, variables, policy, counts, batch, chunk)
    sides = lambda x: (x[..., 0].ravel(), x[..., 1].ravel())
    scored = Scored(*sides(now), *sides(then), *sides(counts), batch.exists.ravel())
    return scored, {name: existing(x, batch) for name, x in seen.items()}, policy.balance


def _told(loss: Array, metrics: Mapping[str, Array], seen: Each, batch: Pairs) -> Each:
    shaped = {name: x.reshape(batch.exists.shape) for name, x in metrics.items()}
    margin = shaped["rewards_chosen"] - shaped["rewards_rejected"]
    told = {"margin": margin, "accuracy": (margin > 0).astype(jnp.float32)}
    return {"loss": loss.reshape(batch.exists.shape) * seen.get("weight", 1.0)} | shaped | told | seen


def _together(loss: Callable[..., Losses], scored: Scored) -> Found:
    """The losses of all pairs of a step at once, and what each log-probability does to their sum."""

    def total(chosen: Array, rejected: Array) -> tuple[Array, Losses]:
        value, metrics = loss(scored._replace(chosen=chosen, rejected=rejected))
        return value.sum(), (value, metrics)

    pulls, (value, metrics) = jax.grad(total, (0, 1), has_aux=True)(scored.chosen, scored.rejected)
    return jax.lax.stop_gradient(Found(value, pulls[0], pulls[1], metrics))


def _follow(found: Found, scored: Scored) -> Losses:
    """The losses that were found, with the gradient that was found, for the log-probabilities of a microbatch."""
    pull = lambda slope, x: slope.ravel() * (x - jax.lax.stop_gradient(x))
    moved = pull(found.pull_chosen, scored.chosen) + pull(found.pull_rejected, scored.rejected)
    return found.loss.ravel() + moved, found.metrics


def _wpo(model: Model, variables, policy: Read, counts, batch: Pairs, chunk) -> Float[Array, "B K"]:
    met = losses.collision(policy.features, model.output(variables), policy.learned, **head_of(model, chunk))
    return losses.wpo(answers(policy.logprobs, batch), answers(met, batch), counts).prod(axis=-1)


def said(
    model: Model, *, ld_alpha: float | None = None, chunk: Chunk | None = None
) -> Callable[[Mapping, Pairs], Each]:
    """What a reference says of each pair, to be computed once: (variables, batch) -> {"chosen", "rejected"}."""

    def each(variables: Mapping, batch: Pairs) -> Each:
        found = read(model, variables, batch, None, chunk)
        sums_ = weighed(found.logprobs, found.learned, batch, ld_alpha)
        return {"chosen": sums_[..., 0], "rejected": sums_[..., 1]}

    return each


def of(config: Config) -> Callable[..., Pairwise]:
    """The objective that a configuration describes: (model, chunk=None) -> Pairwise.

    Raises:
      ValueError: losses that do not go together, or an option that none of them takes.

    Example:
      >>> of(Config(loss="kto", wpo=True))
      Traceback (most recent call last):
      ValueError: preference.wpo is for losses over pairs; kto judges answers one by one
    """
    c, kept = config, {"reference": config.reference}
    if c.beta is not None and c.beta <= 0:
        raise ValueError(f"preference.beta is {c.beta}; it must be above 0, or what is rejected would be preferred")
    if c.ld_alpha is not None and not 0 <= c.ld_alpha <= 1:
        raise ValueError(
            f"preference.ld_alpha is {c.ld_alpha}; it must be between 0 and 1, which is the loss without it"
        )
    if not c.unpaired:  # refuse what cannot be, before a model is read
        one: Any = jax.ShapeDtypeStruct((1,), jnp.float32)
        exists: Any = jax.ShapeDtypeStruct((1,), jnp.bool_)
        jax.eval_shape(losses.weighted(c.terms, **c.keywords), Scored(one, one, one, one, one, one, exists))
        _expect_single(c.terms, c.wpo)
        more = {"ld_alpha": c.ld_alpha, "wpo": c.wpo}
        return functools.partial(preference, terms=c.terms, **kept, **more, **c.keywords)
    name, *others = c.terms
    if others or c.terms[name] != 1:
        raise ValueError(
            f"preference.loss is {c.terms}; {name} judges answers one by one, and stands alone, at weight 1"
        )
    for option in ("ld_alpha", "wpo"):
        if getattr(c, option):
            raise ValueError(f"preference.{option} is for losses over pairs; {name} judges answers one by one")
    losses.unpaired(name, **c.keywords)
    return functools.partial(judged, loss=name, **kept, **c.keywords)
