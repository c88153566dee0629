"""New tokens: in a tokenizer, in the tables that have a row for each token, and in the files of a folder.

The row of a token is its id, wherever a table ends. Checkpoints often have more rows than tokens:

    tokens a b c d e, as many rows       and <x>   ->  its row is the 6th, which the tables grow by
    tokens a b c d e, 8 rows             and <x>   ->  its row is the 6th, which is there; the 7th and 8th stay

A new row begins at the mean of those of the tokens that were there. The score of the new token is then the mean of
theirs, and exp(mean) <= mean(exp): it takes at most 1 / V of the probability, and the model answers as before. At zero
or at random it may take nearly all, as scores are often far below zero.

Source: Hewitt 2021, "Initializing New Word Embeddings for Pretrained Language Models".
"""

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Int

from jaxsft.hub.files import TOKENIZER, CheckpointError, copy_companions, read_json, resolve, write_json
from jaxsft.hub.source import read_config
from jaxsft.hub.tokenizer import load_tokenizer
from jaxsft.models import ModelConfig

Part = Callable[[Any], np.ndarray]
ROWS = 4096  # of a table that are read at one time
FIELDS = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")  # of a token, in tokenizer.json


class Vocabulary(NamedTuple):
    """What a tokenizer asks of the tables that have a row for each token."""

    size: int  # rows of the tables
    known: Int[np.ndarray, "K"]  # ids of the tokens that the checkpoint has rows of
    new: Int[np.ndarray, "N"]  # ids of those that it has not learned

    def lines(self) -> dict[str, str]:
        """The new tokens in figures, for people."""
        first, last = self.new.min(), self.new.max()
        return {"new tokens": f"{len(self.new):,}, in rows {first:,} to {last:,} of {self.size:,}"}


def load_vocabulary(
    path: str, tokens: Sequence[str] = (), *, special: Sequence[str] = (), multiple: int = 1
) -> tuple[Any, Vocabulary | None]:
    """Loads a checkpoint's tokenizer with new tokens, and tells the rows that they need.

    Args:
      path: a folder or hub name.
      tokens: text that is one token from now on, wherever it stands.
      special: tokens that a chat template writes: generation leaves them out of its text, and in the words of a message
        they are spelled, unless data.control_tokens.
      multiple: where the tables grow, they grow to a multiple of this many rows.

    Returns:
      (tokenizer, vocabulary), the latter for `hub.load_variables`, None without new tokens. Tables never shrink.

    Raises:
      CheckpointError: there is no tokenizer or config; a token is empty, given twice, or has a row already; a special
        one has white space around it, which templates swallow.

    Example:
      >>> import jaxsft
      >>> tokenizer, vocabulary = load_vocabulary(jaxsft.BASE, ["<sum>", "<diff>"])
      >>> vocabulary.size, vocabulary.new.tolist(), tokenizer("1<sum>2")["input_ids"][1]
      (2562, [2560, 2561], 2560)
      >>> model, params = jaxsft.load(jaxsft.BASE, vocabulary=vocabulary)
      >>> params["embed"]["table"].shape
      (2562, 192)
    """
    tokenizer, given = load_tokenizer(path), [*tokens, *special]
    if not given:
        return tokenizer, None
    before, rows = tokenizer.get_vocab(), read_config(resolve(path))[1].vocab_size
    _check(given, special, {token: number for token, number in before.items() if number < rows})
    if multiple < 1:
        raise CheckpointError(f"tables cannot grow to a multiple of {multiple} rows; give vocab_multiple 1 or more")
    fresh = lambda some: [token for token in some if token not in before]  # the others lack a row alone
    tokenizer = _with_tokens(tokenizer, fresh(tokens), fresh(special))
    known = np.array(sorted(number for number in before.values() if number < rows))
    new = np.array(tokenizer.convert_tokens_to_ids(given))
    last = new.max() + 1
    return tokenizer, Vocabulary(rows if last <= rows else int(-(-last // multiple) * multiple), known, new)


def _check(given: Sequence[str], special: Sequence[str], known: Mapping[str, int]) -> None:
    """Refuses what cannot be a new token."""
    for number, token in enumerate(given):
        if not token:
            raise CheckpointError(f"the {number + 1}. of the new tokens is empty; leave it out")
        if token in given[:number]:
            raise CheckpointError(
                f"the new token {token!r} is given twice; give it once, among new_tokens or new_special_tokens"
            )
        if token in known:
            raise CheckpointError(
                f"the new token {token!r} is token {known[token]} of the tokenizer already; leave it out. Its row "
                "trains with all others where tuning.trainable has embed/table"
            )
        if token in special and token != token.strip():
            raise CheckpointError(f"the new token {token!r} is special and has white space around it; leave that out")


def _with_tokens(tokenizer: Any, tokens: Sequence[str], special: Sequence[str]) -> Any:
    from tokenizers import AddedToken

    larger = copy.deepcopy(tokenizer)
    # Found in the text as it is written: a normalizer may put a blank before a token's own text.
    larger.add_tokens([AddedToken(token, normalized=False, special=False) for token in tokens])
    larger.add_tokens([AddedToken(token, normalized=False, special=True) for token in special], special_tokens=True)
    return larger


# ---- rows -----------------------------------------------------------------------------------------------------------


def with_rows(config: ModelConfig, vocabulary: Vocabulary | None) -> ModelConfig:
    """A model's numbers with as many rows as a vocabulary needs."""
    return config if vocabulary is None else dataclasses.replace(config, vocab_size=vocabulary.size)


def grown(part: Part, shape: tuple[int, ...], vocabulary: Vocabulary, dtype: np.dtype) -> Part:
    """Makes index -> that slice of a table which has the rows of new tokens as well.

    Args:
      part: index -> that slice of the table that the checkpoint has, float32.
      shape: of that table, or of a bias with a number for each token.
      vocabulary: the rows there are to be.
      dtype: of the slices.

    Example:
      >>> table = np.array([[1.0, 2.0], [3.0, 4.0], [9.0, 9.0]], "float32")  # the third row is padding
      >>> vocabulary = Vocabulary(4, np.array([0, 1]), np.array([2, 3]))
      >>> grown(table.__getitem__, table.shape, vocabulary, table.dtype)((slice(1, 4), slice(0, 1))).ravel().tolist()
      [3.0, 2.0, 2.0]
    """
    rows, begin = shape[0], _mean(part, shape, vocabulary.known)

    def slice_of(index: Any) -> np.ndarray:
        ids, rest = np.arange(vocabulary.size)[index[0]], tuple(index[1:])
        out = np.empty((len(ids), *begin[rest].shape), dtype)
        there = ids[ids < rows]
        if len(there):
            out[: len(there)] = part((slice(int(there[0]), int(there[-1]) + 1), *rest))
        out[(ids >= rows) | np.isin(ids, vocabulary.new)] = begin[rest]
        return out

    return slice_of


def _mean(part: Part, shape: tuple[int, ...], known: Int[np.ndarray, "K"]) -> np.ndarray:
    """The mean of some rows, float32; added in float64, so that it is the same however the table is read."""
    chosen, total = np.isin(np.arange(shape[0]), known), np.zeros(shape[1:])
    for first in range(0, shape[0], ROWS):
        here = slice(first, min(first + ROWS, shape[0]))
        total += part((here, *[slice(None)] * (len(shape) - 1)))[chosen[here]].sum(0, dtype=np.float64)
    return np.asarray(total / chosen.sum(), np.float32)


# ---- files ----------------------------------------------------------------------------------------------------------


def save_tokens(folder: Path, tokenizer: Any, base: str) -> None:
    """Puts the tokens that the base's tokenizer does not have into the files of a folder; nothing where there are none.

    Args:
      folder: with the tokenizer of the base, or without one, as an adapter's.
      tokenizer: from `load_vocabulary`.
      base: the folder or hub name that it was made of.

    Raises:
      CheckpointError: the disk is full or refuses.
    """
    if jax.process_index() or tokenizer.get_vocab() == load_tokenizer(base).get_vocab():
        return
    if not (folder / "tokenizer.json").is_file():
        copy_companions(resolve(base), folder, TOKENIZER)
    if not (folder / "tokenizer.json").is_file():  # the base has older files alone
        tokenizer.save_pretrained(folder)
        return
    raw, settings, older = (folder / name for name in ("tokenizer.json", "tokenizer_config.json", "added_tokens.json"))
    core = read_json(raw)
    have = {token["content"] for token in core["added_tokens"]}
    more = {n: token for n, token in sorted(tokenizer.added_tokens_decoder.items()) if token.content not in have}
    fields = lambda token: {name: getattr(token, name) for name in FIELDS}
    write_json(
        raw, core | {"added_tokens": [*core["added_tokens"], *({"id": n, **fields(t)} for n, t in more.items())]}
    )
    _extend(settings, "added_tokens_decoder", {str(n): fields(token) for n, token in more.items()})
    if older.is_file():
        write_json(older, read_json(older) | {token.content: n for n, token in more.items()})


def _extend(file: Path, key: str, more: Mapping[str, Any]) -> None:
    """Adds to a mapping in a JSON file, where the file has it."""
    known = read_json(file) if file.is_file() else {}
    if key in known:
        write_json(file, known | {key: known[key] | more})
