"""Fusion: one order of passages out of two, by their words and by their meaning.

`ranks` is the default: reciprocal ranks, and where two passages tie, as two do that each lead one of the lists, the
one with the better `scores`. These are 0.4 of the BM25 score over the best passage's, 0.6 of the cosine as it is. The
cosine is not stretched to the range it has among the candidates, on purpose: an embedder that cannot tell passages
apart, such as an English one asked in Chinese, gives them all about the same cosine, and so has hardly a say; by ranks
it has half. (A search does not ask an embedder that cannot read the question, see `search.UNKNOWN`, and then finds
what BM25 does.) With all-MiniLM-L6-v2, recall of the right passage among the first and the first five, the embedder
always asked:

                              BM25          cosine        ranks         scores
    XQuAD, English            0.935 0.989   0.897 0.988   0.941 0.990   0.947 0.994
    XQuAD, Chinese            0.928 0.990   0.165 0.341   0.397 0.737   0.912 0.993
    PubMedQA                  0.960 0.987   0.981 0.994   0.987 0.994   0.986 0.994

With ties left to the order of the lists, ranks find 0.933 of the English first ones, less than words alone. The weight
of `scores` was chosen on every second question and holds on the others.

Sources: Bruch, Gai and Ingber 2022, arXiv:2210.11934 (convex combination, normalised by the least a score can be);
Cormack, Clarke and Büttcher 2009 (reciprocal ranks).
"""

import numpy as np
from jaxtyping import Float

TIE = 1e-9  # far below what one rank makes of a difference


def scores(
    words: Float[np.ndarray, "N"], meaning: Float[np.ndarray, "N"], weight: float = 0.4
) -> Float[np.ndarray, "N"]:
    """A convex combination of scores, equation 5 of Bruch et al.: BM25 over its best, and the cosine itself.

    Args:
      words: BM25 of some passages, 0 where the question's words are not in it.
      meaning: their cosines with the question.
      weight: of the words.

    Example:
      >>> scores(np.array([8.0, 4.0, 0.0]), np.array([0.2, 0.8, 0.6]))
      array([0.52, 0.68, 0.36])
    """
    return weight * words / max(float(np.max(words, initial=0.0)), 1e-9) + (1 - weight) * meaning


def ranks(words: Float[np.ndarray, "N"], meaning: Float[np.ndarray, "N"], k: int = 60) -> Float[np.ndarray, "N"]:
    """Reciprocal rank fusion: the sum of 1 / (k + rank), ranks from 1; equal sums are told apart by `scores`.

    Args:
      words, meaning: as for `scores`; a passage without the question's words has no rank among them.
      k: how little the first ranks stand out.

    Example:
      >>> ranks(np.array([8.0, 4.0, 0.0]), np.array([0.2, 0.8, 0.6])).round(4)
      array([0.0323, 0.0325, 0.0161])
    """
    rank = lambda values: np.argsort(np.argsort(-values, kind="stable"), kind="stable") + 1
    sums = np.where(words > 0, 1 / (k + rank(words)), 0.0) + 1 / (k + rank(meaning))
    return np.round(sums, 9) + TIE * scores(words, meaning)
