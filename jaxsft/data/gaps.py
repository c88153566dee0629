"""What masking asks of a tokenizer: the token that stands for a gap, which others may, and where words begin."""

import json
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from jaxsft.data.rows import DataError

SPACES = ("Ġ", "▁")  # how tokens write the blank that a word begins with: byte-level BPE, sentencepiece
BREAKS = ("Ċ", "č", "ĉ")  # line ends and tabs of byte-level BPE


class Masking(NamedTuple):
    """A tokenizer's side of masked-token training."""

    mask_id: int
    ordinary: Int[np.ndarray, "K"]  # the tokens that are not special: those that may be masked, or be put in a gap
    continues: Bool[np.ndarray, "V"] | None  # does a token go on with the word of the one before it?


def masking(tokenizer: Any, *, whole_words: bool = False) -> Masking:
    """Looks a tokenizer over for masked-token training.

    Args:
      tokenizer: of transformers, fast.
      whole_words: tell where words begin as well.

    Raises:
      DataError: it has no mask token, or does not write where words begin.

    Example:
      >>> from tokenizers import Tokenizer, models
      >>> from transformers import PreTrainedTokenizerFast
      >>> core = Tokenizer(models.WordPiece({"[MASK]": 0, "[UNK]": 1, "lamp": 2, "##s": 3}, unk_token="[UNK]"))
      >>> found = masking(PreTrainedTokenizerFast(tokenizer_object=core, mask_token="[MASK]"), whole_words=True)
      >>> found.mask_id, found.ordinary.tolist(), found.continues.tolist()
      (0, [1, 2, 3], [False, False, False, True])
    """
    if tokenizer.mask_token_id is None:
        raise DataError(
            "the tokenizer has no mask_token, and masked-token training needs one; choose an encoder's checkpoint, as "
            "bert-base-uncased, or name one in tokenizer_config.json"
        )
    vocabulary = tokenizer.get_vocab()
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    ordinary = np.array(sorted(set(vocabulary.values()) - special - set(tokenizer.all_special_ids)), np.int32)
    if not whole_words:
        return Masking(tokenizer.mask_token_id, ordinary, None)
    continues = np.zeros(max(vocabulary.values()) + 1, bool)
    goes_on = _goes_on(tokenizer, vocabulary)
    for token, number in vocabulary.items():
        continues[number] = goes_on(token)
    return Masking(tokenizer.mask_token_id, ordinary, continues)


def _goes_on(tokenizer: Any, vocabulary: dict[str, int]):
    """token -> whether it goes on with a word."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    if model["type"] == "WordPiece":
        return lambda token: token.startswith(model["continuing_subword_prefix"])
    if model["type"] == "WordLevel":
        return lambda token: False
    space = next((space for space in SPACES if any(token.startswith(space) for token in vocabulary)), None)
    if space is None:
        raise DataError(
            f"the tokens of this {model['type']} tokenizer do not tell where words begin (no '##', '{SPACES[0]}' or "
            f"'{SPACES[1]}'); set train.whole_words to false"
        )
    return lambda token: not token.startswith((space, *BREAKS))
