"""A policy of two layers, its critic and its reward model, and some episodes, packed and one by one."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsft import lora, losses, rollouts, session, sharding, tree, tuning
from jaxsft.models import DecoderConfig, Model, build, logits
from jaxsft.tuning import Learner

CONFIG = DecoderConfig(48, 16, 32, 2, heads=4, kv_heads=2, head_dim=4, max_position=64)
MODEL = build(CONFIG)
EPISODES, LONGEST, LENGTH, PIECES = 12, 14, 28, 4  # to two prompts a group of three


def shaken(part: Any, seed: int, size: float = 0.15) -> Any:
    """Arrays, each changed a little."""
    leaves, form = jax.tree.flatten(part)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return jax.tree.unflatten(
        form, [x + size * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    )


@functools.cache
def base() -> dict:
    """Parameters with scores that tell tokens apart."""
    return shaken(jax.jit(MODEL.init)(jax.random.key(0)), 1, 0.3)


@functools.cache
def learner(method: str, critic: str | None = None) -> Learner:
    """A policy and perhaps a critic that have learned something: "lora", "tables" beside LoRA, "partial" or "full"."""
    patterns = {
        "lora": [lora.TRAINABLE],
        "tables": [lora.TRAINABLE, "params/(embed|head)/table"],
        "head": [lora.TRAINABLE],
        "partial": ["params/.*/(o|down)/kernel"],
        "full": ["params/.*"],
    }[method]
    targets = ".*/(q|v|up)" + "|head" * (method == "head")
    spec = lora.LoRA(rank=2, alpha=4, targets=targets) if lora.TRAINABLE in patterns else None
    variables = {"params": jax.tree.map(jnp.copy, base())}
    variables |= {"lora": lora.init(jax.random.key(1), base(), spec)} if spec else {}
    made = Learner(MODEL, tuning.Plan(patterns, None, spec), *tree.partition(variables, patterns))
    made = session.with_reference(made)
    if critic:
        made = session.with_critic(made, critic, sharding.mesh(1, 1, 1, devices=jax.devices()[:1]))
    return made._replace(trainable=shaken(made.trainable, 2))


@functools.cache
def reward_adapter() -> dict:
    """A reward model over the base, of another rank than the policy's adapter and on other layers."""
    low = lora.init(jax.random.key(3), base(), lora.LoRA(rank=3, alpha=3, targets=".*/(k|o|down)"))
    return {"lora": shaken(low, 4), "params": {"score": {"kernel": shaken(jnp.zeros((CONFIG.hidden, 1)), 5, 1.0)}}}


WHOLE = build(DecoderConfig(48, 8, 16, 1, heads=2, kv_heads=1, head_dim=4, max_position=64, labels=1))


@functools.cache
def reward_whole() -> dict:
    """A reward model of another shape."""
    return {"params": shaken(jax.jit(WHOLE.init)(jax.random.key(6)), 7, 0.3)}


class Drawn(NamedTuple):
    """Episodes of one to eight tokens, after prompts of one to six."""

    prompts: list[list[int]]
    answers: list[list[int]]

    @property
    def packed(self) -> rollouts.Packed:
        return rollouts.pack(self.prompts, self.answers, length=LENGTH, unit=PIECES)

    @property
    def rows(self) -> np.ndarray:
        """Each in a row of its own, on the left."""
        found = np.zeros((len(self.prompts), LONGEST), np.int32)
        for row, prompt, answer in zip(found, *self, strict=True):
            row[: len(prompt) + len(answer)] = [*prompt, *answer]
        return found


@functools.cache
def drawn(seed: int = 0) -> Drawn:
    draw = np.random.default_rng(seed)
    some = lambda low, high: draw.integers(3, CONFIG.vocab_size, draw.integers(low, high)).tolist()
    return Drawn([some(1, 7) for _ in range(EPISODES)], [some(1, 9) for _ in range(EPISODES)])


def learned(tokens: Any) -> np.ndarray:
    """Where the tokens of answers are predicted."""
    return np.asarray(losses.shift(*map(jnp.asarray, (tokens.tokens, tokens.mask, tokens.segments)))[1])


def by_episode(values: Any, episode: np.ndarray, number: int, learned: np.ndarray) -> np.ndarray:
    """What stands at the predicted tokens of one episode."""
    return np.asarray(values)[(episode == number) & learned]


@functools.partial(jax.jit, static_argnums=0)
def features_alone(model: Model, variables: dict, rows: jax.Array) -> jax.Array:
    return model.features(variables, rows)


def logprobs_alone(variables: dict, temperature: float = 1.0, seed: int = 0) -> list[np.ndarray]:
    """The log-probability of each token of each answer, every episode by itself."""
    found, rows = drawn(seed), drawn(seed).rows
    scores = logits(MODEL, variables, features_alone(MODEL, variables, rows)) / temperature
    table = np.asarray(jax.nn.log_softmax(scores.astype(jnp.float32)), np.float64)
    return [
        np.array([table[i, len(prompt) + t - 1, token] for t, token in enumerate(answer)])
        for i, (prompt, answer) in enumerate(zip(*found, strict=True))
    ]


def values_alone(model: Model, variables: dict, seed: int = 0) -> list[np.ndarray]:
    """What a score says at each token of each episode, the prompt's included, every episode by itself."""
    found, kernel = drawn(seed), np.asarray(variables["params"]["score"]["kernel"], np.float64)
    features = np.asarray(features_alone(model, variables, found.rows), np.float64)[..., : len(kernel)]
    return [(features[i, : len(p) + len(a)] @ kernel)[:, 0] for i, (p, a) in enumerate(zip(*found, strict=True))]
