"""Prompts that wait to be read: packed in rows one behind the other, so that no padding is computed.

Three prompts, "a b c", "d e" and "f g h i", in pieces of one row of six:

    piece 0   a b c d e .      positions 0 1 2 0 1 0      segments 1 1 1 2 2 0
    piece 1   f g h i . .                0 1 2 3 0 0               1 1 1 1 0 0

A piece is what is read at one time. Its shape, and how many there may be, follow from the number of prompts and the
width of the longest one, so that other prompts of the same number need no other program.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Int

WIDTH, TOKENS = 256, 1024  # of a row and of a piece, or as few more as the longest prompt needs


class Queue(NamedTuple):
    """Prompts in the order of their numbers, which is that of their answers."""

    tokens: Int[Array | np.ndarray, "C R W"]
    positions: Int[Array | np.ndarray, "C R W"]
    segments: Int[Array | np.ndarray, "C R W"]
    until: Int[Array | np.ndarray, "C"]  # the first prompt behind a piece
    rows: Int[Array | np.ndarray, "N"]  # of each prompt, in its piece
    starts: Int[Array | np.ndarray, "N"]  # the place of its first token in the row
    lengths: Int[Array | np.ndarray, "N"]


def pack(prompts: Sequence[Sequence[int]], *, width: int, most: int, apart: int = 1) -> Queue:
    """Packs prompts in their order, into the first row that has room behind the one before.

    Args:
      prompts: token ids.
      width: that none of them exceeds.
      most: prompts of a piece.
      apart: rows of a piece are a multiple of this, the devices that share them out.

    Returns:
      the queue; numbers behind those of the prompts, up to a multiple of `most`, are of none.

    Example:
      >>> queue = pack([[1, 2, 3], [4, 5], [6, 7, 8, 9]], width=4, most=2)
      >>> queue.tokens.tolist(), queue.until.tolist(), queue.starts.tolist()
      ([[[1, 2, 3, 4, 5, 0, 0, 0]], [[6, 7, 8, 9, 0, 0, 0, 0]]], [2, 3], [0, 3, 0, 0])
    """
    N = -(-len(prompts) // most) * most
    W = min(max(WIDTH, 2 * width), most * width)
    R = -(-max(1, min(TOKENS, most * width) // W) // apart) * apart
    C = -(-N // min(most, R * (W // width)))
    tokens, positions, segments = (np.zeros((C, R, W), np.int32) for _ in range(3))
    rows, starts, lengths = np.zeros(N, np.int32), np.zeros(N, np.int32), np.ones(N, np.int32)
    until = np.full(C, len(prompts), np.int32)
    piece = row = start = first = 0
    for number, prompt in enumerate(prompts):
        if start + len(prompt) > W:
            row, start = row + 1, 0
        if row == R or number - first == most:
            until[piece] = first = number
            piece, row, start = piece + 1, 0, 0
        here = piece, row, slice(start, start + len(prompt))
        tokens[here], positions[here], segments[here] = prompt, np.arange(len(prompt)), number - first + 1
        rows[number], starts[number], lengths[number] = row, start, len(prompt)
        start += len(prompt)
    return Queue(tokens, positions, segments, until, rows, starts, lengths)
