"""Cross-encoders: question and text read together, one score a pair. Slower than vectors, and better at order.

    [CLS] which lamp is green ? [SEP] the harbour lamp is green . [SEP]
    types  0    0    0   0    0  0    0     1     1       1   1   1    1   1     of most BERTs; RoBERTa has none

A text that is too long is cut, of question and text the longer one first, as transformers does. The scores are logits:
their order is what counts. sentence-transformers puts a sigmoid over them unless its config says otherwise, which
changes no order; `probability` is that.

Source: Nogueira and Cho 2019, arXiv:1901.04085.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from jaxsft import axes, hub, sharding
from jaxsft.hub.files import read_json
from jaxsft.models import Model, relevance
from jaxsft.rag.embed import BATCH_TOKENS, batches, tokenizer_of
from jaxsft.run import RunError


class CrossEncoder(NamedTuple):
    """What scores texts beside a question: higher is better, comparable only for one question."""

    name: str
    max_tokens: int  # of question and text together
    score: Callable[[str, Sequence[str]], Float[np.ndarray, "N"]]  # (question, texts) -> logits, float32


def load(
    path: str,
    *,
    mesh: Mesh | None = None,
    dtype: jax.typing.DTypeLike = jnp.float32,
    batch_tokens: int = BATCH_TOKENS,
) -> CrossEncoder:
    """Loads a cross-encoder: a Bert- or RobertaForSequenceClassification with one label.

    Args:
      path: a folder or a hub name, such as cross-encoder/ms-marco-MiniLM-L6-v2.
      mesh, dtype, batch_tokens: as for `embed.load`.

    Raises:
      RunError: the model does not score pairs of texts.
      CheckpointError: a folder that cannot be used as it is.
    """
    folder = hub.resolve(path)
    _, config = hub.read_config(folder)
    if not getattr(config, "ranks", False):
        raise RunError(
            f"{path} does not score two texts together; choose a checkpoint whose config.json names a "
            "BertForSequenceClassification or RobertaForSequenceClassification with one label"
        )
    model, variables = hub.load_variables(str(folder), mesh, dtype=dtype)
    tokenizer, how = hub.load_tokenizer(str(folder)), {"mesh": mesh, "batch_tokens": batch_tokens}
    return build(
        model, variables, tokenizer, types=gives_types(folder) and getattr(config, "types", 1) > 1, name=path, **how
    )


def gives_types(folder: Path) -> bool:
    """Whether the tokenizer of a BERT says which text a token is of; one of no model's class does so only if told."""
    file = folder / "tokenizer_config.json"
    said = read_json(file) if file.is_file() else {}
    if names := said.get("model_input_names"):
        return "token_type_ids" in names
    return said.get("tokenizer_class") not in ("PreTrainedTokenizerFast", "TokenizersBackend")


def build(
    model: Model,
    variables: Mapping,
    tokenizer: Any,
    *,
    types: bool,
    name: str = "",
    mesh: Mesh | None = None,
    batch_tokens: int = BATCH_TOKENS,
) -> CrossEncoder:
    """Makes a cross-encoder of a model in memory; types: is it told which text a token is of? Others: `embed.build`."""
    most = int(min(tokenizer.model_max_length, model.config.max_position))
    own = tokenizer_of(tokenizer, most)
    rows = axes.rows(mesh)
    put = (lambda x: x) if mesh is None else (lambda x: jax.device_put(x, sharding.rows(mesh)))

    def score(question: str, texts: Sequence[str]) -> Float[np.ndarray, "N"]:
        read = own.encode_batch([(question, text) for text in texts])
        found = np.zeros(len(texts), np.float32)
        for at, tokens, sizes in batches([pair.ids for pair in read], batch_tokens, most=most, rows=rows):
            second = np.zeros_like(tokens)
            for row, i in enumerate(at if types else ()):
                second[row, : sizes[row]] = read[i].type_ids
            values = _scores(model, variables, put(tokens), put(second), put(sizes[:, None]))
            found[at] = sharding.to_host(values)[: len(at)]
        return found

    return CrossEncoder(name, most, score)


def probability(logits: Float[np.ndarray, "N"]) -> Float[np.ndarray, "N"]:
    """The sigmoid of scores: what sentence-transformers' `predict` gives by default.

    Example:
      >>> probability(np.array([0.0, -800.0])).tolist()
      [0.5, 0.0]
    """
    return 0.5 * (1 + np.tanh(0.5 * np.asarray(logits)))


def _score(model, variables, tokens, types, sizes) -> Float[Array, "B"]:
    segments = (jnp.arange(tokens.shape[1]) < sizes).astype(jnp.int32)
    positions = jnp.maximum(jnp.cumsum(segments, axis=1) - 1, 0)
    return relevance(variables, model.features(variables, tokens, positions, segments, types=types))


_scores = jax.jit(_score, static_argnums=0)
