"""A policy of two layers, its critic and its reward model, and some episodes, packed and one by one."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsft import lora, losses, rollouts, session, sharding, tree, tuning
from jaxsft.lora import LoRA
from jaxsft.models import DecoderConfig, Model, build, logits
from jaxsft.objectives import Assessed, Judged
from jaxsft.tuning import Learner

CONFIG = DecoderConfig(48, 16, 32, 2, heads=4, kv_heads=2, head_dim=4, max_position=64)
MODEL = build(CONFIG)
EPISODES, LONGEST, LENGTH, PIECES = 12, 14, 28, 4  # to two prompts a group of three


def shaken(part: Any, seed: int, size: float = 0.15) -> Any:
    """Arrays, each changed a little."""
    draw = np.random.default_rng(seed)
    noisy = lambda x: jnp.asarray(np.asarray(x) + size * draw.standard_normal(x.shape, np.float32))
    return jax.tree.map(noisy, part)


def adapter(seed: int, spec: LoRA) -> dict:
    """A fresh one."""
    return jax.jit(lambda key, params: lora.init(key, params, spec))(jax.random.key(seed), base())


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
    spec = LoRA(rank=2, alpha=4, targets=targets) if lora.TRAINABLE in patterns else None
    variables = {"params": jax.tree.map(jnp.copy, base())}
    variables |= {"lora": adapter(1, spec)} if spec else {}
    made = Learner(MODEL, tuning.Plan(patterns, None, spec), *tree.partition(variables, patterns))
    made = session.with_reference(made)
    if critic:
        made = session.with_critic(made, critic, sharding.mesh(1, 1, 1, devices=jax.devices()[:1]))
    return made._replace(trainable=shaken(made.trainable, 2))


@functools.cache
def reward_adapter() -> dict:
    """A reward model over the base, of another rank than the policy's adapter and on other layers."""
    low = adapter(3, LoRA(rank=3, alpha=3, targets=".*/(k|o|down)"))
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
def drawn() -> Drawn:
    draw = np.random.default_rng(0)
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


@functools.partial(jax.jit, static_argnums=1)
def tables_alone(variables: dict, temperature: float) -> jax.Array:
    """The log-probabilities of all tokens at each position of each episode, every episode by itself."""
    rows = drawn().rows
    scores = logits(MODEL, variables, MODEL.features(variables, rows)) / temperature
    return jax.nn.log_softmax(scores.astype(jnp.float32))


def answers_of(tables: np.ndarray) -> list[np.ndarray]:
    """The [T, V] of each answer's tokens."""
    return [
        tables[i, len(prompt) - 1 : len(prompt) + len(answer) - 1]
        for i, (prompt, answer) in enumerate(zip(*drawn(), strict=True))
    ]


def logprobs_alone(variables: dict, temperature: float = 1.0) -> list[np.ndarray]:
    """The log-probability of each token of each answer, every episode by itself."""
    tables = answers_of(np.asarray(tables_alone(variables, temperature), np.float64))
    return [table[np.arange(len(answer)), answer] for table, answer in zip(tables, drawn().answers, strict=True)]


def entropies_alone(variables: dict, temperature: float = 1.0) -> list[np.ndarray]:
    """The entropy at each of them."""
    tables = answers_of(np.asarray(tables_alone(variables, temperature), np.float64))
    return [-(np.exp(table) * table).sum(axis=-1) for table in tables]


def values_alone(model: Model, variables: dict) -> list[np.ndarray]:
    """What a score says at each token of each episode, the prompt's included, every episode by itself."""
    found, kernel = drawn(), np.asarray(variables["params"]["score"]["kernel"], np.float64)
    features = np.asarray(features_alone(model, variables, found.rows), np.float64)[..., : len(kernel)]
    return [(features[i, : len(p) + len(a)] @ kernel)[:, 0] for i, (p, a) in enumerate(zip(*found, strict=True))]


def assessed(seed: int = 0) -> Assessed:
    """What models might say of the tokens of `drawn().packed`, drawn at random."""
    tokens = drawn().packed.tokens
    where, draw = learned(tokens), np.random.default_rng(seed)
    some = lambda low, high: np.where(where, draw.uniform(low, high, where.shape), 0).astype(np.float32)
    score = np.where(np.asarray(losses.last(jnp.asarray(where))), some(-2, 2), 0).astype(np.float32)
    return Assessed(some(-3, 0), some(-3, 0), some(-1, 1), score)


def lists(values: Any) -> list[list[float]]:
    """What stands at the predicted tokens of each of the `drawn()` episodes, in float64."""
    tokens, episode = drawn().packed
    return [by_episode(values, episode, n, learned(tokens)).astype(float).tolist() for n in range(EPISODES)]


def scored(monkeypatch, module: Any, found: Assessed, **how: Any) -> Callable[..., Judged]:
    """(given, silent, kl_coef) -> what `module.scoring` makes of `drawn()`, of which models say `found`."""
    monkeypatch.setattr(module, "assess", lambda *args, **kwargs: jax.tree.map(jnp.asarray, found))
    score = module.scoring(MODEL, **how)

    def run(given: Any, silent: Any = None, kl_coef: float = 0.0) -> Judged:
        quiet = np.zeros(EPISODES, bool) if silent is None else np.asarray(silent)
        return score({}, *drawn().packed, np.asarray(given, np.float32), quiet, np.float32(kl_coef))

    return run
