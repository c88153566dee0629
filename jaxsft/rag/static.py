"""Static encoders: a table with a vector for each token, whose mean is the text's. No model, no order of words.

    text     lamps of the harbour     [UNK] has no vector and no share in the mean
    vector   (lamps + of + the + harbour) / 4, then at length 1

Two kinds of folder: model2vec's, whose tokens may share rows and have weights, and that of sentence-transformers'
StaticEmbedding, in which [UNK] is a token like any other. Rows may be int8, as the scale falls out with the length.

Source: Tulkens and van Dongen 2024, github.com/MinishLab/model2vec.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from jaxsft.hub import CheckpointError
from jaxsft.hub.files import DTYPES, Reader, read_json


def table(folder: Path) -> Float[np.ndarray, "V D"]:
    """Reads the row of each token, with its weight.

    Raises:
      CheckpointError: no table among the tensors, or one that is not known.
    """
    reader = Reader(folder)
    name = next((name for name in ("embedding.weight", "embeddings") if name in reader.files), None)
    if name is None or set(reader.files) - {name, "mapping", "weights"}:
        known = "embedding.weight, or embeddings with mapping and weights"
        raise CheckpointError(f"{folder} has the tensors {', '.join(sorted(reader.files))}; {known} were expected")
    _ = reader.dtype(name, DTYPES)
    rows = np.asarray(reader.read(name), np.float32)
    if "mapping" in reader.files:
        rows = rows[reader.read("mapping")]
    return rows * np.asarray(reader.read("weights"), np.float32)[:, None] if "weights" in reader.files else rows


def dropped(folder: Path, tokenizer) -> int | None:
    """The token without a vector: model2vec leaves the unknown one out, sentence-transformers does not."""
    file = folder / "config.json"
    leaves = file.is_file() and read_json(file).get("model_type") == "model2vec"
    return tokenizer.token_to_id("[UNK]") if leaves else None


def mean(
    rows: Float[np.ndarray, "V D"], texts: Sequence[Sequence[int]], dropped: int | None = None
) -> Float[np.ndarray, "N D"]:
    """The mean row of each text's tokens, at length 1; zeros for a text without any.

    Example:
      >>> mean(np.array([[9.0, 9.0], [3.0, 0.0], [0.0, 4.0]], np.float32), [[1, 2, 0], [0]], dropped=0).tolist()
      [[0.6000000238418579, 0.800000011920929], [0.0, 0.0]]
    """
    found = np.zeros((len(texts), rows.shape[1]), np.float32)
    for i, text in enumerate(texts):
        kept = [token for token in text if token != dropped]
        if kept:
            found[i] = rows[kept].mean(axis=0)
    return found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-12)
