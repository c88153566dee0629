"""Generation: a prefill that reads the prompts into a cache, and a decode loop, compiled together.

Prompts of different lengths stand left-aligned; each row has its own cursor, and a slot of the cache is a position, so
what pads a short prompt lies ahead of the cursor, where nothing looks, until it is written over. Lengths are rounded up
to powers of two: a conversation that grows compiles only now and then.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxsft import sharding
from jaxsft.models import Cache, Model, logits
from jaxsft.types import Key


@dataclass(frozen=True)
class Config:
    """How answers are drawn."""

    max_new_tokens: int = 128
    """the most tokens of an answer"""
    temperature: float = 0.0
    """0 takes the likeliest token; 1 draws from the model's own distribution"""
    top_k: int = 0
    """draw among the k likeliest tokens; 0: among all"""
    top_p: float = 1.0
    """draw among the likeliest tokens that together have this probability"""
    seed: int = 0
    """of the draws"""


def pick(
    logits: Float[Array, "B V"], key: Key, *, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0
) -> Int[Array, "B"]:
    """Chooses a token for each row.

    Args:
      logits: scores of the next token.
      key: of the draw; unused at temperature 0.
      temperature: divides the logits; 0 takes the likeliest.
      top_k: keeps the k likeliest, and ties with the last of them; 0 keeps all.
      top_p: then keeps the smallest set of the likeliest whose probability reaches this (Holtzman et al. 2019,
        arXiv:1904.09751, eq. 2); the likeliest always stays.

    Example:
      >>> pick(jnp.log(jnp.array([[0.1, 0.6, 0.3]])), jax.random.key(0))
      Array([1], dtype=int32)
    """
    if temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits.astype(jnp.float32) / temperature
    if top_k:
        least = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if top_p < 1:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        shares = jax.nn.softmax(ordered, axis=-1)
        needed = jnp.cumsum(shares, axis=-1) - shares < top_p  # the sum before this token falls short
        needed = needed.at[:, 0].set(True)
        least = jnp.min(jnp.where(needed, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)


def generate(
    model: Model,
    variables: Mapping,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    stop: Sequence[int] = (),
    key: Key | None = None,
) -> list[list[int]]:
    """Continues several prompts at once.

    Args:
      model: from `hub.load` or `models.build`.
      variables: {"params": ..., "lora": ...}.
      prompts: token ids, of any lengths above 0.
      max_new_tokens: the most tokens of an answer.
      temperature, top_k, top_p: see `pick`.
      stop: tokens that end an answer; they are left out of it.
      key: of the draws; needed above temperature 0.

    Returns:
      the new tokens of each prompt.

    Raises:
      ValueError: no prompt, an empty one, more tokens than the model has positions, a token that it does not have, no
        key where one is needed.

    Example:
      >>> import jaxsft
      >>> model, params = jaxsft.load(jaxsft.BASE)
      >>> len(generate(model, {"params": params}, [[5, 6], [7]], max_new_tokens=4)[1])
      4
    """
    tokens, lengths = _align(model, variables, prompts, max_new_tokens)
    out, sizes = _generate(
        model,
        variables,
        tokens,
        lengths,
        _needed(key, temperature),
        max_new=max_new_tokens,
        draw=(temperature, top_k, top_p),
        stop=tuple(sorted(set(stop))),
    )
    return [row[:size].tolist() for row, size in zip(sharding.to_host(out), sharding.to_host(sizes), strict=True)]


def stream(
    model: Model,
    variables: Mapping,
    prompt: Sequence[int],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    stop: Sequence[int] = (),
    key: Key | None = None,
) -> Iterator[int]:
    """Continues one prompt and yields each token as it comes; arguments as for `generate`, and the same tokens.

    Example:
      >>> import jaxsft
      >>> model, params = jaxsft.load(jaxsft.BASE)
      >>> len(list(stream(model, {"params": params}, [5, 6], max_new_tokens=3)))
      3
    """
    tokens, lengths = _align(model, variables, [prompt], max_new_tokens)
    key = _needed(key, temperature)
    scores, cache = _prefill(model, variables, tokens, lengths, _bucket(max_new_tokens))
    for i in range(max_new_tokens):
        token = pick(scores, jax.random.fold_in(key, i), temperature=temperature, top_k=top_k, top_p=top_p)
        if int(token[0]) in stop:
            return
        yield int(token[0])
        scores, cache = _next(model, variables, token, lengths + i, cache)


def asker(
    model: Model, tokenizer, prompts: Sequence[Sequence[int]], stop: Sequence[int], config: Config
) -> Callable[[Mapping], list[str]]:
    """Makes variables -> answers to some prompts, to compare a model before and after with the same draws.

    A prompt that leaves no room for an answer among the model's positions loses its beginning.
    """
    room = max(1, model.config.max_position - config.max_new_tokens)
    prompts = [prompt[-room:] for prompt in prompts]

    def ask(variables: Mapping) -> list[str]:
        draw = {"temperature": config.temperature, "top_k": config.top_k, "top_p": config.top_p}
        key, new = jax.random.key(config.seed), config.max_new_tokens
        answers = generate(model, variables, prompts, max_new_tokens=new, stop=stop, key=key, **draw) if prompts else []
        return [tokenizer.decode(answer, skip_special_tokens=True).strip() for answer in answers]

    return ask


def filler(model: Model, tokenizer, passages: Sequence[Sequence[int]], mask_id: int) -> Callable[[Mapping], list[str]]:
    """Makes variables -> the likeliest tokens for the masks of some texts, to compare an encoder before and after.

    Args:
      model: an encoder with the head that predicts masked tokens.
      tokenizer: of transformers.
      passages: token ids, of any lengths.
      mask_id: of the mask token.
    """
    width = min(_bucket(max(map(len, passages), default=1)), model.config.max_position)
    tokens = np.zeros((len(passages), width), np.int32)
    for row, passage in zip(tokens, passages, strict=True):
        row[: len(passage)] = passage
    lengths = np.array([len(passage) for passage in passages])
    segments = (np.arange(width) < lengths[:, None]).astype(np.int32)
    best = jax.jit(
        lambda variables: logits(model, variables, model.features(variables, tokens, None, segments)).argmax(-1)
    )

    def fill(variables: Mapping) -> list[str]:
        guesses = sharding.to_host(best(variables)) if passages else ()
        chosen = (guess[row == mask_id].tolist() for guess, row in zip(guesses, tokens, strict=True))
        return [", ".join(tokenizer.decode([token]).strip() for token in row) for row in chosen]

    return fill


def _needed(key: Key | None, temperature: float) -> Key:
    if temperature and key is None:
        raise ValueError("temperature above 0 draws at random; give a key, such as jax.random.key(0)")
    return jax.random.key(0) if key is None else key


def _align(
    model: Model, variables: Mapping, prompts: Sequence[Sequence[int]], new: int
) -> tuple[Int[np.ndarray, "B P"], Int[np.ndarray, "B"]]:
    if not prompts or not all(len(p) for p in prompts):
        raise ValueError(
            "every prompt needs at least one token; an empty one can start with the model's bos or eos token"
        )
    longest = max(len(p) for p in prompts)
    if longest + new > model.config.max_position:
        raise ValueError(
            f"a prompt of {longest} tokens and {new} new ones exceed the model's {model.config.max_position} positions;"
            " shorten the prompt or lower max_new_tokens"
        )
    largest, rows = max(map(max, prompts)), len(variables["params"]["embed"]["table"])
    if largest >= rows:
        raise ValueError(
            f"a prompt has the token {largest}, and the model {rows} tokens; give it the tokenizer it was made with"
        )
    tokens = np.zeros((len(prompts), _bucket(longest)), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    return tokens, np.array([len(p) for p in prompts], np.int32)


def _bucket(n: int) -> int:
    return max(16, 1 << (n - 1).bit_length())


@functools.partial(jax.jit, static_argnums=(0, 4))
def _prefill(model, variables, tokens, lengths, new: int) -> tuple[Float[Array, "B V"], Cache]:
    B, P = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(P), (B, P))
    features, cache = model.extend(variables, tokens, positions, model.cache(B, P + new))
    last = features[jnp.arange(B), lengths - 1][:, None]
    return logits(model, variables, last)[:, 0], cache


@functools.partial(jax.jit, static_argnums=0, donate_argnums=4)
def _next(model, variables, token, positions, cache) -> tuple[Float[Array, "B V"], Cache]:
    features, cache = model.extend(variables, token[:, None], positions[:, None], cache)
    return logits(model, variables, features)[:, 0], cache


@functools.partial(jax.jit, static_argnums=0, static_argnames=("max_new", "draw", "stop"))
def _generate(model, variables, tokens, lengths, key, *, max_new, draw, stop):
    temperature, top_k, top_p = draw
    B = tokens.shape[0]

    def ends(token: Int[Array, "B"]) -> Bool[Array, "B"]:
        return jnp.isin(token, jnp.array(stop, jnp.int32)) if stop else jnp.zeros(B, bool)

    def go_on(carry):
        i, _, done, *_ = carry
        return (i < max_new) & ~done.all()

    def advance(carry):
        i, scores, done, sizes, out, cache = carry
        token = pick(scores, jax.random.fold_in(key, i), temperature=temperature, top_k=top_k, top_p=top_p)
        done = done | ends(token)
        out = out.at[:, i].set(token)
        sizes = jnp.where(done, sizes, i + 1)
        scores, cache = _next(model, variables, token, lengths + i, cache)
        return i + 1, scores, done, sizes, out, cache

    scores, cache = _prefill(model, variables, tokens, lengths, max_new)
    zeros = jnp.zeros(B, jnp.int32)
    start = (jnp.int32(0), scores, jnp.zeros(B, bool), zeros, jnp.zeros((B, max_new), jnp.int32), cache)
    _, _, _, sizes, out, _ = jax.lax.while_loop(go_on, advance, start)
    return out, sizes
