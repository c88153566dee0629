"""What writing text asks of a tokenizer, worked out once: its special tokens, and a core that keeps offsets."""

import functools
import re
from typing import Any, NamedTuple

from jaxsft.data.rows import DataError

MARKUP = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")


class Vocabulary(NamedTuple):
    """What rendering asks of a tokenizer, worked out once."""

    core: Any  # a copy of tokenizers.Tokenizer that gives offsets as they are and adds nothing
    special: frozenset[int]  # ids
    pattern: re.Pattern  # of the special tokens, with the white space that they swallow
    ids: dict[str, int]  # of the special tokens, by content
    guarded: re.Pattern  # of those that people must not write
    named: dict[str, str]  # bos_token and so on, for templates
    bos: int | None  # what the tokenizer writes before a text by itself
    prefix: str  # put before a piece of text, so that no space is put there

    def mark_for(self, text: str) -> str:
        """A character to mark a text with, "" if there is nothing to mark."""
        if not self.guarded.search(text):
            return ""
        return next(mark for mark in map(chr, range(0xFDD0, 0xFDF0)) if mark not in text)

    def guard(self, text: str, mark: str) -> str:
        return self.guarded.sub(lambda found: f"{found[0][:1]}{mark}{found[0][1:]}", text) if mark else text

    def with_stop(self, text: str, first: int, last: int) -> int:
        """The end of a turn with its stop token; where a template's marks leave that out, it stands right behind."""
        if any(found.end() == last for found in self.pattern.finditer(text, first, last)):
            return last
        found = self.pattern.match(text, last)
        return found.end() if found else last


def vocabulary(tokenizer: Any) -> Vocabulary:
    """What is asked of a tokenizer, looked up once.

    Raises:
      DataError: it is not fast.

    Example:
      >>> vocabulary(doctest_tokenizer()).special
      frozenset({1})
    """
    if not tokenizer.is_fast:
        raise DataError(
            f"{type(tokenizer).__name__} gives no character offsets, so what is learned cannot be told; "
            "use the fast tokenizer of this model, one with a tokenizer.json"
        )
    return _look_at(tokenizer, len(tokenizer), tokenizer.bos_token, tokenizer.eos_token)


@functools.lru_cache(maxsize=4)
def _look_at(tokenizer: Any, size: int, bos: str | None, eos: str | None) -> Vocabulary:
    """What is cached is of a tokenizer with so many tokens, bos and eos; one that was changed is looked at again."""
    from tokenizers import Tokenizer

    core = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    core.post_processor = None  # it would cut spaces off the offsets
    core.no_truncation()
    core.no_padding()
    added = core.get_added_tokens_decoder()
    tokens: dict[str, tuple[int, Any]] = {t.content: (number, t) for number, t in added.items() if t.special}
    for name in tokenizer.special_tokens_map.values():
        for content in [name] if isinstance(name, str) else name:
            tokens.setdefault(content, (tokenizer.convert_tokens_to_ids(content), None))
    swallow = lambda token: (r"\s*" if token and token.lstrip else "", r"\s*" if token and token.rstrip else "")
    longest = sorted(tokens, key=len, reverse=True)
    parts = [f"{swallow(tokens[c][1])[0]}(?:{re.escape(c)}){swallow(tokens[c][1])[1]}" for c in longest]
    guarded = [re.escape(content) for content in longest if content not in MARKUP and len(content) > 1]
    nothing = "(?!)"
    by_itself = tokenizer("", verbose=False)["input_ids"][:1]
    begins = by_itself and by_itself[0] == tokenizer.bos_token_id
    probe = core.encode("a", add_special_tokens=False).tokens[:1]
    return Vocabulary(
        core,
        frozenset(number for number, _ in tokens.values()),
        re.compile("|".join(parts) or nothing),
        {content: number for content, (number, _) in tokens.items()},
        re.compile("|".join(guarded) or nothing),
        {name: token for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)},
        tokenizer.bos_token_id if begins else None,
        "\n" if probe and probe[0].startswith("▁") else "",
    )


def doctest_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({"?": 0, "</s>": 1, "a": 2, "b": 3}, "?"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")
