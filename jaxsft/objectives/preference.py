"""Preference: a policy learns to find one answer likelier than another, compared with the reference it started as.

The reference is the base without its adapter, so LoRA needs one set of weights; where the base's own parameters train,
a copy of those; or its log-probabilities are computed once, before training, and come with the batch. It is run on its
own and not in one batch with the policy: the backward pass would then go through its rows, too.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxsft import losses
from jaxsft.losses import Scored
from jaxsft.models import Model
from jaxsft.objectives.judged import judged
from jaxsft.objectives.language import expect
from jaxsft.objectives.pairs import (
    Each,
    Known,
    Pairwise,
    Read,
    Reference,
    answers,
    before,
    divergence,
    index,
    known,
    read,
    spread,
    sums,
)
from jaxsft.types import Key, Pairs, Sums


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
    chunk: int | None = None,
    **options: Any,
) -> Pairwise:
    """Losses over pairs, see `losses.PREFERENCE`.

    Args:
      model: a decoder.
      terms: name of a loss to its weight; {"sigmoid": 1.0} is DPO.
      reference: "live" runs it: the base without its adapter, and where the base's parameters train, those that
        `session.with_reference` keeps; without them the policy would be compared with itself. "batch" takes
        `Pairs.reference`, see `session.precompute`. Losses that have none ignore both.
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
    loss = losses.weighted(terms, **options)
    if wpo and (coupled := set(terms) & losses.COUPLED):
        raise ValueError(f"wpo weighs single pairs, and {coupled.pop()} sorts all of a step; leave out one of the two")
    compared = bool(set(terms) - losses.WITHOUT_REFERENCE)

    def look(variables: Mapping, batch: Pairs, key: Key | None) -> tuple[Scored, Each, Read]:
        policy = read(model, variables, batch, key, chunk)
        counts = answers(policy.learned, batch)
        now, then = weighed(policy.logprobs, policy.learned, batch, ld_alpha), batch.reference
        if not compared:
            then = jnp.zeros_like(now)
        elif reference == "live":
            old = before(model, variables, batch, chunk)
            then = weighed(old, policy.learned, batch, ld_alpha)
        scored = Scored(*_sides(now), *_sides(then), *_sides(counts), batch.exists.ravel())
        whole = answers(policy.logprobs, batch)
        seen = {"logps_chosen": whole[..., 0], "logps_rejected": whole[..., 1]}
        if compared and reference == "live":
            seen["kl"] = divergence(policy, old, batch)
        if wpo:
            seen["weight"] = _wpo(model, variables, policy, counts, batch, chunk)
        return scored, {name: known(x, batch) for name, x in seen.items()}, policy

    def finish(batch: Pairs, loss_: Array, metrics: Mapping[str, Array], seen: Each) -> Each:
        shaped = {name: x.reshape(batch.exists.shape) for name, x in metrics.items()}
        margin = shaped["rewards_chosen"] - shaped["rewards_rejected"]
        told = {"margin": margin, "accuracy": (margin > 0).astype(jnp.float32)}
        return {"loss": loss_.reshape(batch.exists.shape) * seen.get("weight", 1.0)} | shaped | told | seen

    def each(variables: Mapping, batch: Pairs | Known, key: Key | None = None) -> tuple[Each, Pairs, Read]:
        pairs, whole = batch if isinstance(batch, Known) else (batch, {})
        scored, seen, policy = look(variables, pairs, key)
        if "value" in whole:  # what was found of the whole step, with the gradient of each log-probability
            pull = lambda side, x: whole[f"pull_{side}"].ravel() * (x - jax.lax.stop_gradient(x))
            found = whole["value"].ravel() + pull("chosen", scored.chosen) + pull("rejected", scored.rejected)
            metrics = {name.removeprefix("metric_"): x for name, x in whole.items() if name.startswith("metric_")}
            return finish(pairs, found, metrics, seen), pairs, policy
        more = {"mean_count": whole["mean_count"][0, 0]} if "mean_count" in whole else {}
        return finish(pairs, *loss(scored, **more), seen), pairs, policy

    def objective(variables: Mapping, batch: Pairs | Known, key: Key | None) -> Sums:
        found, pairs, policy = each(variables, batch, key)
        moe, value = model.config.moe, found.pop("loss")
        return sums(value, found, pairs, None if key is None or moe is None else moe.balance * policy.balance)

    def prepare(variables: Mapping, batch: Pairs, over: Callable) -> Known:
        shape = batch.exists.shape
        counts = answers(losses.shift(batch.tokens, batch.mask, batch.segments)[1], batch)[..., 0]
        mean = jnp.where(batch.exists, counts, 0).sum() / jnp.maximum(batch.exists.sum(), 1)
        whole = {"mean_count": jnp.full(shape, mean, jnp.float32)}
        if set(terms) & losses.COUPLED:
            rows = lambda *piece: jax.tree.map(lambda x: x.reshape(-1, shape[1]), look(*piece)[0])
            scored = jax.tree.map(jnp.ravel, over(rows))

            def total(chosen, rejected):
                value, metrics = loss(scored._replace(chosen=chosen, rejected=rejected), mean_count=mean)
                return value.sum(), (value, metrics)

            pulls, (value, metrics) = jax.grad(total, (0, 1), has_aux=True)(scored.chosen, scored.rejected)
            found = {"value": value, "pull_chosen": pulls[0], "pull_rejected": pulls[1]}
            found |= {f"metric_{name}": x for name, x in metrics.items()}
            whole |= {name: jax.lax.stop_gradient(x).reshape(shape) for name, x in found.items()}
        return Known(batch, whole)

    needs = set(terms) & (losses.COUPLED | losses.COUNTED)
    return Pairwise(objective, prepare if needs else None, lambda variables, batch: each(variables, batch)[0])


def _sides(x: Float[Array, "B K 2"]) -> tuple[Array, Array]:
    return x[..., 0].ravel(), x[..., 1].ravel()


def _wpo(model: Model, variables, policy: Read, counts, batch: Pairs, chunk) -> Float[Array, "B K"]:
    bent = {"scale": model.config.logit_scale, "soft_cap": model.config.logit_soft_cap, "chunk": chunk}
    met = losses.collision(policy.features, model.output(variables), policy.learned, **bent)
    return losses.wpo(answers(policy.logprobs, batch), answers(met, batch), counts).prod(axis=-1)


def weighed(
    logprobs: Float[Array, "B T"], learned: Bool[Array, "B T"], batch: Pairs, ld_alpha: float | None
) -> Float[Array, "B K 2"]:
    """Log-probabilities of answers; with LD-DPO, less of what the longer one says beyond the shorter one's length."""
    if ld_alpha is None:
        return answers(logprobs, batch)
    shortest = spread(answers(learned, batch).min(axis=-1), batch)
    return answers(logprobs * losses.ld_weights(index(learned, batch), shortest, ld_alpha), batch)


def said(model: Model, *, ld_alpha: float | None = None, chunk: int | None = None) -> Callable[[Mapping, Pairs], Each]:
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
    c, kept = config, {"reference": "batch" if config.reference == "precomputed" else "live"}
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
        if c.wpo and (coupled := set(c.terms) & losses.COUPLED):
            raise ValueError(f"preference.wpo weighs single pairs, and {coupled.pop()} sorts all of a step")
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
