"""Maximal marginal relevance: hits that are relevant and do not say the same thing twice.

Source: Carbonell and Goldstein 1998, "The use of MMR, diversity-based reranking for reordering documents".
"""

import numpy as np
from jaxtyping import Float


def select(relevance: Float[np.ndarray, "N"], vectors: Float[np.ndarray, "N D"], k: int, diversity: float) -> list[int]:
    """Chooses k of N candidates, one after the other.

    Each time the one is taken with the greatest (1 - diversity) relevance - diversity (largest cosine with one taken
    before). Relevance is brought to 0..1 first, the range of cosines, whatever score it is.

    Args:
      relevance: of the candidates, higher is better.
      vectors: theirs, of length 1.
      k: how many; all where there are fewer.
      diversity: 0 goes by relevance alone, 1 by difference alone after the first.

    Returns:
      their places, in the order they were chosen.

    Raises:
      ValueError: diversity is not within 0..1.

    Example:
      >>> twice = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
      >>> select(np.array([0.9, 0.8, 0.3]), twice, 2, 0.0), select(np.array([0.9, 0.8, 0.3]), twice, 2, 0.5)
      ([0, 1], [0, 2])
    """
    if not 0 <= diversity <= 1:
        raise ValueError(f"diversity is {diversity}; give a number from 0 (relevance alone) to 1 (difference alone)")
    if not len(relevance):
        return []
    low, high = float(np.min(relevance)), float(np.max(relevance))
    worth = (relevance - low) / (high - low) if high > low else np.ones(len(relevance))
    chosen: list[int] = []
    nearest = np.zeros(len(relevance))  # the first is the most relevant one
    left = np.ones(len(relevance), bool)
    while len(chosen) < min(k, len(relevance)):
        value = np.where(left, (1 - diversity) * worth - diversity * nearest, -np.inf)
        # With diversity 1 the first choice is between equals; relevance decides.
        best = int(np.argmax(value if chosen else worth))
        similar = vectors @ vectors[best]
        nearest = np.maximum(nearest, similar) if chosen else similar
        chosen.append(best)
        left[best] = False
    return chosen
