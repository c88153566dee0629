"""Teaching a retriever: rows to learn from, hard negatives found by the model itself, and how well it finds.

    examples -> mine -> ContrastRows -> train.make_step with objectives.contrastive -> Embedder -> measure

Source: Karpukhin et al. 2020, arXiv:2004.04906, in-batch and hard negatives; mining below a share of the positive's
similarity: Moreira et al. 2024, arXiv:2407.15831, section 3.2, TopK-PercPos.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from jaxsft.data import ContrastRows, DataError
from jaxsft.rag.embed import Embedder
from jaxsft.rag.examples import Example, passages

BLOCK = 1024  # questions that are compared with the corpus at one time


@dataclass(frozen=True)
class Config:
    """What a retriever learns, and how it is to be read."""

    pooling: str = ""
    """mean, cls, lasttoken, ..., see docs; by default what the checkpoint says"""
    max_length: int | None = None
    """tokens of a question or passage, longer ones are cut; by default what the checkpoint takes"""
    scale: float = 20.0
    """of cosines in the softmax, the inverse of the temperature"""
    symmetric: bool = False
    """a passage is to find its question, too"""
    margin: float | None = None
    """leave out negatives that are more similar than the right passage by more than this"""
    negatives: int = 1
    """hard negatives of each question in a step, first the row's own, then mined ones; 0 for none but the batch's"""
    mine: int = 0
    """hard negatives to mine for each question before training, with the model as it is then; give embed.negatives as
    well"""
    mine_below: float = 0.95
    """passages above this share of the right one's similarity are not mined: they may be right, too"""


def to_rows(
    examples: Sequence[Example],
    query: Callable[[Sequence[str]], list[list[int]]],
    document: Callable[[Sequence[str]], list[list[int]]],
    negatives: int = 0,
) -> ContrastRows:
    """Tokenises examples.

    Args:
      examples: with the negatives that they have, mined ones among them.
      query, document: texts -> token ids, with prompts, cut at the longest.
      negatives: places for hard negatives in each row; fewer are filled up with nothing.

    Raises:
      DataError: no examples, or a text without any token.
    """
    if not examples:
        raise DataError("there are no rows to learn from; give rows with query and positive")
    known = passages(examples)
    number = {text: i for i, text in enumerate(known)}
    candidates = np.full((len(examples), 1 + negatives), -1, np.int32)
    for row, one in zip(candidates, examples, strict=True):
        chosen = [number[text] for text in (one.positive, *one.negatives[:negatives])]
        row[: len(chosen)] = chosen
    questions, found = query([one.query for one in examples]), document(known)
    if not all(map(len, [*questions, *found])):
        raise DataError("a text has no token that the model knows; take it out")
    digest = hashlib.blake2b(repr((questions, found, candidates.tolist())).encode(), digest_size=12).hexdigest()
    return ContrastRows(questions, found, candidates, digest)


def mine(
    embedder: Embedder, examples: Sequence[Example], corpus: Sequence[str], count: int, *, below: float = 0.95
) -> list[Example]:
    """Finds for each question the most similar passages that are not right, behind the negatives that it has.

    Args:
      embedder: the model as it is.
      examples: whose positives are right for their question, wherever it stands.
      corpus: passages.
      count: how many negatives for each.
      below: only passages of less than this share of the right one's similarity.

    Returns:
      the examples with more negatives; fewer than `count` where the corpus has no more.
    """
    right: dict[str, set[str]] = {}
    for one in examples:
        right.setdefault(one.query, set()).add(one.positive)
    known = list(dict.fromkeys([*corpus, *(one.positive for one in examples)]))
    number = {text: i for i, text in enumerate(known)}
    vectors, found = embedder.documents(known), []
    for start in range(0, len(examples), BLOCK):
        block = examples[start : start + BLOCK]
        asked = embedder.queries([one.query for one in block])
        for one, similar in zip(block, asked @ vectors.T, strict=True):
            limit = below * similar[number[one.positive]]
            similar[[number[text] for text in right[one.query]]] = -np.inf
            similar[len(corpus) :] = -np.inf
            similar[similar >= limit] = -np.inf
            best = np.argsort(-similar, kind="stable")[: count + len(one.negatives)]
            new = [known[i] for i in best if similar[i] > -np.inf and known[i] not in one.negatives]
            found.append(one._replace(negatives=(*one.negatives, *new[:count])))
    return found


def ranks(embedder: Embedder, examples: Sequence[Example], corpus: Sequence[str]) -> Int[np.ndarray, "Q"]:
    """The place of the best right passage for each distinct question, from 1; ties count against it.

    Raises:
      DataError: a right passage is not in the corpus.
    """
    number = {text: i for i, text in enumerate(corpus)}
    right: dict[str, list[int]] = {}
    for one in examples:
        if one.positive not in number:
            raise DataError(f"the corpus does not have the passage {one.positive[:60]!r}, which a row asks for")
        right.setdefault(one.query, []).append(number[one.positive])
    vectors, asked, found = embedder.documents(corpus), list(right), []
    for start in range(0, len(asked), BLOCK):
        block = asked[start : start + BLOCK]
        for query, similar in zip(block, embedder.queries(block) @ vectors.T, strict=True):
            mine_, others = similar[right[query]].max(), np.delete(similar, right[query])
            found.append(1 + int((others >= mine_).sum()))
    return np.array(found, np.int32)


def measure(ranks: Int[np.ndarray, "Q"]) -> dict[str, float]:
    """Recall at 1 and 5, and the mean reciprocal rank within the first ten.

    Example:
      >>> measure(np.array([1, 2, 20, 1]))
      {'recall@1': 0.5, 'recall@5': 0.75, 'mrr@10': 0.625}
    """
    return {
        "recall@1": float((ranks <= 1).mean()),
        "recall@5": float((ranks <= 5).mean()),
        "mrr@10": float(np.where(ranks <= 10, 1 / ranks, 0).mean()),
    }
