"""Strings that end an answer, as a table over tokens that the compiled loop can read.

A string may begin and end inside of tokens. An automaton over bytes knows after each byte how much of which string the
text ends with (Aho and Corasick 1975, https://doi.org/10.1145/360825.360855); since a token is always the same bytes,
it has one row a state and one column a token.
"""

import json
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # how vocabularies with byte fallback write a byte
ENDS = -1  # the state after a string


class Strings(NamedTuple):
    """Some strings, and the automaton that finds them."""

    strings: tuple[str, ...]
    table: Int[np.ndarray, "S V"]  # table[state, token] is the next state, ENDS where a string ends inside the token


def compile(strings: Sequence[str], tokenizer: Any) -> Strings | None:
    """Makes the automaton that finds strings in the text of tokens.

    Args:
      strings: to be found; special tokens may be written in them.
      tokenizer: of transformers.

    Returns:
      None where there are no strings.

    Raises:
      ValueError: a string is empty.
    """
    if not strings:
        return None
    if not all(strings):
        raise ValueError(f"stop strings are {list(strings)}; an empty one would end every answer before it begins")
    moves = automaton([one.encode() for one in strings])
    return Strings(tuple(strings), over_tokens(moves, pieces(tokenizer)))


def until(text: str, strings: Sequence[str]) -> str:
    """The text before the first of some strings.

    Example:
      >>> until("one END two", ["two", "END"])
      'one '
    """
    found = [at for one in strings if (at := text.find(one)) >= 0]
    return text[: min(found)] if found else text


def automaton(words: Sequence[bytes]) -> Int[np.ndarray, "S 256"]:
    """The next state for each state and byte; ENDS stands where a word ends.

    A state is the longest end of the text that begins a word; the first one is the empty text.

    Example:
      >>> moves = automaton([b"ab"])
      >>> [int(moves[state, byte]) for state, byte in [(0, ord("a")), (1, ord("a")), (1, ord("b")), (1, ord("c"))]]
      [1, 1, -1, 0]
    """
    begun = sorted({word[:size] for word in words for size in range(len(word))}, key=len)
    number = {text: state for state, text in enumerate(begun)}
    moves = np.zeros((len(begun), 256), np.int16)
    for state, before in enumerate(begun):
        for byte in set(b"".join(words)):
            text = before + bytes([byte])
            ends = any(text.endswith(word) for word in words)
            longest = next(text[at:] for at in range(len(text) + 1) if text[at:] in number)
            moves[state, byte] = ENDS if ends else number[longest]
    return moves


def over_tokens(moves: Int[np.ndarray, "S 256"], pieces: Sequence[bytes]) -> Int[np.ndarray, "S V"]:
    """The next state for each state and token, from the token's bytes."""
    moves = np.concatenate([moves, np.full((1, 256), ENDS, np.int16)])  # row ENDS, the last: what has ended stays so
    sizes = np.array([len(piece) for piece in pieces])
    order = np.argsort(-sizes, kind="stable")
    starts = np.cumsum(sizes) - sizes
    text = np.frombuffer(b"".join(pieces), np.uint8)
    states = np.repeat(np.arange(len(moves) - 1, dtype=np.int16)[:, None], len(pieces), axis=1)
    for at in range(sizes.max(initial=0)):
        longer = order[: int((sizes > at).sum())]
        states[:, longer] = moves[states[:, longer], text[starts[longer] + at]]
    return states


def pieces(tokenizer: Any) -> list[bytes]:
    """The bytes that each token adds to a text, special ones as they are written."""
    written = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    read = {"bytes": _from_bytes, "words": _from_words}.get(_decoder(tokenizer))
    if read is None:
        read, added = _by_decoding(tokenizer), {}
    else:
        added = {token: one.content.encode() for token, one in tokenizer.added_tokens_decoder.items()}
    return [added[i] if i in added else read(token or "") for i, token in enumerate(written)]


def _decoder(tokenizer: Any) -> str:
    """How a vocabulary writes text: "bytes" a character a byte, "words" with a mark before each word, or else."""
    core = getattr(tokenizer, "backend_tokenizer", None)
    said = "" if core is None or core.decoder is None else core.to_str()
    said = json.dumps(json.loads(said)["decoder"], ensure_ascii=False) if said else ""
    return "bytes" if "ByteLevel" in said else "words" if "▁" in said else ""


def _alphabet() -> dict[str, int]:
    """The characters that stand for bytes in byte-level vocabularies (Radford et al. 2019, GPT 2's encoder.py)."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


ALPHABET = _alphabet()


def _from_bytes(token: str) -> bytes:
    return bytes(ALPHABET[c] for c in token)


def _from_words(token: str) -> bytes:
    byte = BYTE.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else token.replace("▁", " ").encode()


def _by_decoding(tokenizer: Any) -> Callable[[str], bytes]:
    """What a token adds to a text that stands before it, by the tokenizer's own decoder."""
    before = tokenizer.convert_ids_to_tokens(tokenizer("a", add_special_tokens=False)["input_ids"])
    alone = tokenizer.convert_tokens_to_string(before)
    return lambda token: tokenizer.convert_tokens_to_string([*before, token])[len(alone) :].encode()
