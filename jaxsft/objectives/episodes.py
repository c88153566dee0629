"""What models say of drawn answers before anything is learned from them: policy, reference, critic, reward model.

With LoRA all four are one base: the reference is the base alone, and policy, critic and reward model each have an
adapter on it, the last two also a score. `variables` holds them beside each other, {"params": ..., "lora": ...,
"value": {"params": {"score": ...}, "lora": ...}, "reward": likewise}; what a collection does not have is the base's.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxsft import losses, sharding, tree
from jaxsft.losses import Chunk
from jaxsft.models import Model, scores
from jaxsft.objectives.language import head_of
from jaxsft.objectives.pairs import reference as reference_variables
from jaxsft.tree import Tree
from jaxsft.types import Key, Rollouts, Tokens

SCORE = "score/kernel"  # the address of what makes a score of features


class Read(NamedTuple):
    """What a policy says of the tokens that were drawn, each where it is predicted."""

    logprobs: Float[Array, "B T"]
    entropy: Float[Array, "B T"]
    learned: Bool[Array, "B T"]
    features: Float[Array, "B T D"]
    balance: Float[Array, ""]


class Assessed(NamedTuple):
    """What all models say of the tokens of some episodes; 0 where nobody was asked."""

    old: Float[Array, "B T"]
    reference: Float[Array, "B T"]
    value: Float[Array, "B T"]
    score: Float[Array, "B T"]  # of the reward model, where an answer's last token is predicted


class Judged(NamedTuple):
    """Rollouts to learn from, and what is told of them."""

    rollouts: Rollouts
    rewards: Float[Array, "N"]  # of each episode, before the divergence is taken off
    metrics: dict[str, Float[Array, ""]]


def policy_of(variables: Mapping) -> dict:
    """The policy's own variables, without critic, reference and reward model."""
    return {name: part for name, part in variables.items() if name in ("params", "lora", "packed")}


def critic(trainable: Mapping, frozen: Mapping, score: Any, *, shared: bool = False) -> tuple[Tree, Tree]:
    """`variables["value"]` of a policy, split by what learns: all that learns of the policy but its output layer, and a
    score; or a score alone.

    Args:
      trainable, frozen: of the policy, arrays or shapes.
      score: [D, 1], the kernel.
      shared: does it read the policy's features?

    Example:
      >>> critic({"lora": {"q": {"a": 1}, "head": {"a": 2}}}, {"params": {"w": 3}, "lora": {"q": {"scale": 4}}}, 5)
      ({'lora': {'q': {'a': 1}}, 'params': {'score': {'kernel': 5}}}, {'lora': {'q': {'scale': 4}}})
    """
    head = {"score": {"kernel": score}}
    if shared:
        return {"params": head}, {}
    headless = lambda part: {name: x for name, x in part.items() if name != "head"}
    own = {name: headless(part) for name, part in trainable.items()}
    return own | {"params": own.get("params", {}) | head}, {
        "lora": headless(frozen["lora"])
    } if "lora" in frozen else {}


def seen_as(variables: Mapping, name: str) -> dict:
    """The variables of the model that `variables[name]` makes of the base, or is: one that has parameters where the
    base has none, but for a score or an output layer, stands alone.

    Example:
      >>> both = {"params": {"w": 1}, "lora": {"a": 2}, "value": {"params": {"score": {"kernel": 3}}}}
      >>> seen_as(both, "value")
      {'params': {'w': 1, 'score': {'kernel': 3}}}
    """
    own, base = variables[name], tree.flat(variables["params"])
    params = tree.flat(own.get("params", {}))
    if set(params) - {SCORE, "head/table"} - set(base):
        return dict(own)
    packed = {"packed": variables["packed"]} if "packed" in variables else {}
    return packed | own | {"params": tree.nest(base | params)}


def read(
    model: Model,
    variables: Mapping,
    batch: Tokens | Rollouts,
    key: Key | None,
    *,
    temperature: float = 1.0,
    learned_entropy: bool = False,
    chunk: Chunk | None = None,
) -> Read:
    """Runs a policy over episodes.

    Args:
      model, variables: what runs.
      batch: the episodes.
      key: of dropout; None for none.
      temperature: that tokens are drawn at, which the distribution is of.
      learned_entropy: has the entropy a gradient?
      chunk: see `losses.logprobs`.
    """
    targets, learned = losses.shift(batch.tokens, batch.mask, batch.segments)
    features, balance = model.learn(variables, batch.tokens, batch.positions, batch.segments, dropout=key)
    lp, entropy = losses.entropies(
        features,
        model.output(variables),
        targets,
        learned,
        temperature=temperature or 1.0,
        learned=learned_entropy,
        **head_of(model, chunk),
    )
    return Read(lp, entropy, learned, features, balance)


def values(
    model: Model, variables: Mapping, batch: Tokens | Rollouts, features: Float[Array, "B T D"], key: Key | None
) -> Float[Array, "B T"]:
    """What the critic expects from each position on.

    A critic that has a score alone reads it off the policy's features; one with weights of its own runs.
    """
    if set(tree.flat(variables["value"])) != {f"params/{SCORE}"}:
        own = seen_as(variables, "value")
        features = model.learn(own, batch.tokens, batch.positions, batch.segments, dropout=key)[0]
    return scores(variables["value"], features[..., : model.config.hidden])  # an adapter of the output layer widens


def assess(
    model: Model,
    variables: Mapping,
    tokens: Tokens,
    *,
    temperature: float,
    reference: bool,
    old: bool = True,
    judge: Model | None = None,
    pieces: int = 1,
    chunk: Chunk | None = None,
) -> Assessed:
    """Asks the policy, and who else there is, about all episodes of a rollout, a piece of them at a time.

    Args:
      model: the policy's.
      variables: with "value" where there is a critic, with "reward" where there is a reward model.
      tokens: packed episodes.
      temperature: see `read`.
      reference: is the reference asked?
      old: is the policy? Not needed without critic and reference where one step learns from all, which is fresh.
      judge: the reward model; its score is that at an answer's last token.
      pieces: how many pieces.
      chunk: see `losses.logprobs`.
    """
    nothing = jnp.zeros(tokens.tokens[: len(tokens.tokens) // pieces].shape, jnp.float32)

    def one(piece: Tokens) -> Assessed:
        ask = lambda whom: read(model, whom, piece, None, temperature=temperature, chunk=chunk)
        learned = losses.shift(piece.tokens, piece.mask, piece.segments)[1]
        own = ask(policy_of(variables)) if old or "value" in variables else None
        drawn = own.logprobs if own else nothing
        other = ask(reference_variables(variables)).logprobs if reference else nothing
        value = values(model, variables, piece, own.features, None) if own and "value" in variables else nothing
        score = nothing
        if judge is not None:
            texts = seen_as(variables, "reward")
            features = judge.features(texts, piece.tokens, piece.positions, piece.segments)
            score = jnp.roll(scores(texts, features), -1, axis=1)
        hold = lambda x, where: jnp.where(where, x, 0.0)
        drawn, other, value = (hold(x, learned) for x in (drawn, other, value))
        return Assessed(drawn, other, value, hold(score, losses.last(learned)))

    found = jax.lax.map(one, sharding.cut(tokens, pieces))
    return jax.lax.stop_gradient(sharding.join(found))


def each(values: Float[Array, "B T"], episode: Int[Array, "B T"], count: int) -> Float[Array, "N"]:
    """Sums over the tokens of each of `count` episodes.

    Example:
      >>> each(jnp.array([[1.0, 2.0, 3.0, 4.0]]), jnp.array([[1, 1, 0, 2]]), 2).tolist()
      [3.0, 3.0]
    """
    return jax.ops.segment_sum(values.ravel(), episode.ravel(), num_segments=count + 1)[:count]


def spread(values: Float[Array, "N"], episode: Int[Array, "B T"]) -> Float[Array, "B T"]:
    """Gives each token its episode's value; 0 where there is none."""
    return jnp.append(values, 0)[episode]


def rewarded(found: Assessed, episode: Int[Array, "B T"], given: Float[Array, "N"], weight: float) -> Float[Array, "N"]:
    """The reward of each episode: what functions gave it, and the reward model's score times its weight."""
    return given + weight * each(found.score, episode, len(given)) if weight else given


def mean(x: Float[Array, "*n"], mask: Bool[Array, "*n"]) -> Float[Array, ""]:
    """The mean over what is in the mask; 0 where nothing is."""
    return jnp.where(mask, x, 0).sum() / jnp.maximum(mask.sum(), 1)
