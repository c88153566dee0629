"""How well a search finds what is relevant: recall, reciprocal rank, nDCG, and how sure that is.

The figures are those of ir-measures, which asks pytrec_eval, the code of TREC.
"""

from collections.abc import Collection, Mapping, Sequence

import numpy as np
from jaxtyping import Float

from jaxsft.rag.extra import need

MEASURES = ("R@1", "R@5", "RR@10", "nDCG@10")


def measure(
    found: Mapping[str, Sequence[str]], relevant: Mapping[str, Collection[str]], measures: Sequence[str] = MEASURES
) -> dict[str, dict[str, float]]:
    """Measures what was found for some questions.

    Args:
      found: for each question the documents in order, the best first; of several passages of one document the first
        counts. A question that is missing found nothing.
      relevant: for each question the documents that are right.
      measures: by the names of ir-measures; R@5 is recall among the first five, RR@10 the reciprocal rank.

    Returns:
      {measure: {question: value}}; its mean is the figure, see `interval`.

    Example:
      >>> measure({"a": ["x", "y"], "b": ["y"]}, {"a": {"y"}, "b": {"y"}}, ["R@1", "RR@10"])
      {'R@1': {'a': 0.0, 'b': 1.0}, 'RR@10': {'a': 0.5, 'b': 1.0}}
    """
    library = need("ir_measures")
    right = [library.Qrel(question, one, 1) for question, known in relevant.items() for one in known]
    run = [
        library.ScoredDoc(question, one, -float(rank))
        for question, order in found.items()
        for rank, one in enumerate(dict.fromkeys(order))
    ]
    kinds = {library.parse_measure(name): name for name in measures}
    values: dict[str, dict[str, float]] = {name: dict.fromkeys(relevant, 0.0) for name in measures}
    for metric in library.iter_calc(list(kinds), right, run):
        values[kinds[metric.measure]][metric.query_id] = float(metric.value)
    return values


def interval(
    values: Sequence[float] | Float[np.ndarray, "N"], *, seed: int = 0, draws: int = 2000, level: float = 0.95
) -> tuple[float, float, float]:
    """The mean of some values and the interval it lies in, by the bootstrap (Efron 1979, percentiles).

    Args:
      values: one a question.
      seed, draws: of the samples with replacement.
      level: how often the interval holds the mean.

    Returns:
      mean, lower end, upper end.

    Example:
      >>> interval([1.0] * 50)
      (1.0, 1.0, 1.0)
    """
    values = np.asarray(values, np.float64)
    draw = np.random.default_rng(seed)
    means = [float(np.mean(draw.choice(values, len(values)))) for _ in range(draws)]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(np.mean(values)), float(low), float(high)
