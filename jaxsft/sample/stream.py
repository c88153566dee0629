"""One answer, token by token as it comes, for people who wait."""

import functools
from collections.abc import Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxsft.models import Cache, Model
from jaxsft.sample import loop
from jaxsft.sample.draw import GREEDY, Draw, pick
from jaxsft.sample.generate import bucket, check, needed
from jaxsft.sample.stops import Strings, until
from jaxsft.types import Key


def stream(
    model: Model,
    variables: Mapping,
    prompt: Sequence[int],
    *,
    max_new_tokens: int = 128,
    draw: Draw = GREEDY,
    stop: Sequence[int] = (),
    strings: Strings | None = None,
    key: Key | None = None,
) -> Iterator[int]:
    """Continues one prompt and yields each token as it comes; arguments as for `generate`, and the same tokens.

    A stop token is left out. The token in which a string ends is the last one that comes; `pieces` cuts the text.

    Example:
      >>> import jaxsft
      >>> model, params = jaxsft.load(jaxsft.BASE)
      >>> len(list(stream(model, {"params": params}, [5, 6], max_new_tokens=3)))
      3
    """
    width = check(model, variables, [prompt], max_new_tokens)
    tokens = np.pad(np.array([prompt], np.int32), ((0, 0), (0, width - len(prompt))))
    key, state = jax.random.fold_in(needed(key, draw), 0), 0
    scores, cache = _prefill(model, variables, tokens, np.array([len(prompt)]), bucket(max_new_tokens))
    seen = None
    if draw.repetition_penalty != 1:
        seen = jnp.zeros(scores.shape, bool).at[0, np.array(prompt)].set(True)
    for i in range(max_new_tokens):
        token, seen = _pick(scores, key, np.uint32(i), seen, draw)
        chosen = int(token[0])
        if chosen in stop:
            return
        yield chosen
        if strings is not None and chosen < strings.table.shape[1]:
            state = int(strings.table[state, chosen])
        if state < 0 or i + 1 == max_new_tokens:
            return
        scores, cache = _extend(model, variables, token, np.array([len(prompt) + i]), cache)


def pieces(tokenizer, tokens: Iterator[int], strings: Sequence[str] = ()) -> Iterator[str]:
    """Decodes as tokens come, up to the first of some strings; holds back what is not yet a whole character, and what
    may be the beginning of a string.

    Example:
      >>> class Letters:
      ...     def decode(self, ids, skip_special_tokens):
      ...         return "".join(map(chr, ids))
      >>> list(pieces(Letters(), iter(b"one END two"), ["END"]))
      ['o', 'n', 'e', ' ']
    """
    ids, text, shown = [], "", 0
    for token in tokens:
        ids.append(token)
        text = tokenizer.decode(ids, skip_special_tokens=True)
        whole = until(text, strings)
        begun = max((_begun(text, one) for one in strings), default=0)
        ready = len(whole) if whole != text else 0 if text.endswith("\ufffd") else len(text) - begun
        if ready > shown:
            yield whole[shown:ready]
            shown = ready
        if whole != text:
            return
    if text[shown:]:
        yield text[shown:]


def _begun(text: str, string: str) -> int:
    """How much of the string the text ends with."""
    return next(size for size in range(len(string) - 1, -1, -1) if text.endswith(string[:size]))


@functools.partial(jax.jit, static_argnums=(0, 4))
def _prefill(model: Model, variables: Mapping, tokens: Array, lengths: Array, room: int) -> tuple[Array, Cache]:
    places = jnp.arange(tokens.shape[1])[None]
    segments = (places < lengths[:, None]).astype(jnp.int32)
    return loop.prefill(model, variables, tokens, places, segments, (jnp.zeros(1, int), lengths - 1), room=room)


_extend = functools.partial(jax.jit, static_argnums=0, donate_argnums=4)(loop.extend)


@functools.partial(jax.jit, static_argnums=4, donate_argnums=3)
def _pick(scores, key, i, seen, draw: Draw):
    token, _ = pick(scores, jax.random.fold_in(key, i)[None], draw, seen)
    return token, None if seen is None else seen.at[0, token[0]].set(True)
