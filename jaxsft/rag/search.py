"""Search: a question in, the passages that answer it out, by words, by meaning, or by both.

    question -> BM25 and nearest vectors, a few dozen of each -> fusion -> a second opinion -> variety -> hits

In mode hybrid a question in a language that the embedder cannot read (Chinese, for all-MiniLM-L6-v2) is searched for by
its words alone. Meaning is exact up to as many passages as `index.VECTORS`: every vector is compared. Beyond, an
inverted file (IVF) of 8-bit vectors is asked, and its candidates are compared exactly; benchmarks/rag.py says what that
costs and finds.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float

from jaxsft.rag import embed, fusion, mmr, store, where
from jaxsft.rag.extra import need
from jaxsft.rag.records import Hit, Passage
from jaxsft.rag.store import Store
from jaxsft.run import RunError

DEPTH = 50  # candidates by words, and as many by meaning, at least
RERANKED = 30  # of them, the first ones, that a second opinion is asked about
PROBES = 20  # parts of the inverted file that are looked into
REFINE = 4  # candidates compared exactly, in units of DEPTH
UNKNOWN = 0.1  # share of a question's tokens; where the embedder does not know more of them, its opinion is noise
COLUMNS = ["id", "vector", "text", "source", "title", "heading", "start", "end", "page", "tags"]
Mode = Literal["hybrid", "dense", "text"]
Rerank = Callable[[str, Sequence[str]], Sequence[float] | np.ndarray]
Fuse = Callable[[np.ndarray, np.ndarray], np.ndarray]


class Candidate(NamedTuple):
    """A passage on its way to a hit."""

    passage: Passage
    vector: Float[np.ndarray, "D"]
    words: float  # BM25, 0 where it was not found by its words


@dataclass(frozen=True)
class Searcher:
    """A store with what it is asked by."""

    store: Store
    embedder: Any  # see rag.embed; none is needed to search by words alone
    rerank: Rerank | None = None
    """(question, texts) -> a score each, such as a cross encoder's"""
    fuse: Fuse = fusion.ranks
    """makes one order of two in mode hybrid; fusion.scores is the other one"""

    def find(
        self, question: str, *, k: int = 5, mode: Mode = "hybrid", where: Sequence[str] = (), diversity: float = 0.0
    ) -> list[Hit]:
        """Finds the passages that answer a question, the best first.

        Args:
          question: any text; of an empty one nothing is found. No character of it has a special meaning.
          k: hits at most.
          mode: hybrid, dense (by meaning alone), or text (by words alone).
          where: filters, see rag.where.
          diversity: from 0 to 1, how much hits are to differ, see rag.mmr.

        Raises:
          RunError: the store cannot be read or was made with another embedder, or a filter is wrong.
        """
        [hits] = self.find_all([question], k=k, mode=mode, where=where, diversity=diversity)
        return hits

    def find_all(
        self,
        questions: Sequence[str],
        *,
        k: int = 5,
        mode: Mode = "hybrid",
        where: Sequence[str] = (),
        diversity: float = 0.0,
    ) -> list[list[Hit]]:
        """The same for many questions, which are embedded together."""
        if k < 1 or mode not in ("hybrid", "dense", "text"):
            raise RunError(f"k is {k} and the mode {mode!r}; give at least 1, and one of hybrid, dense, text")
        if mode != "text":
            store.check(self.store, self.embedder)
        vectors = self._vectors(questions, mode)
        return [
            self._one(question, vector, k, mode, where, diversity) if question.strip() else []
            for question, vector in zip(questions, vectors, strict=True)
        ]

    def _vectors(self, questions: Sequence[str], mode: Mode) -> list[np.ndarray | None]:
        """None for a question that is searched for by its words alone."""
        seen = [mode == "dense" or (mode == "hybrid" and self.embedder.unknown(one) <= UNKNOWN) for one in questions]
        texts = [question for question, seen in zip(questions, seen, strict=True) if seen]
        made = iter(self.embedder.queries(texts) if texts else ())
        return [next(made) if one else None for one in seen]

    def _one(
        self, question: str, vector: np.ndarray | None, k: int, mode: Mode, conditions: Sequence[str], diversity: float
    ) -> list[Hit]:
        depth, condition = max(DEPTH, 2 * k), where.sql(conditions)
        found: dict[str, Candidate] = {}
        if mode != "dense":
            found |= _by_words(self.store, question, condition, depth)
        if vector is not None and mode != "text" and np.any(vector):  # a question of no known word points nowhere
            found = _by_meaning(self.store, vector, condition, depth) | found
        candidates = list(found.values())
        if not candidates:
            return []
        matrix = np.stack([one.vector for one in candidates])
        words = np.array([one.words for one in candidates])
        meaning = None if vector is None else matrix @ vector
        if meaning is None:
            scores = words
        else:
            scores = meaning if mode == "dense" else self.fuse(words, meaning)
        order = np.argsort(-scores, kind="stable")
        if self.rerank is not None:
            order = order[: max(RERANKED, k)]
            scores = scores.astype(np.float64)
            scores[order] = np.asarray(self.rerank(question, [candidates[i].passage.text for i in order]))
            order = order[np.argsort(-scores[order], kind="stable")]
        if diversity:
            order = order[mmr.select(scores[order], matrix[order], k, diversity)]
        similarity = lambda i: None if meaning is None else float(meaning[i])
        return [Hit(candidates[i].passage, float(scores[i]), similarity(i)) for i in order[:k]]


def load(uri: str, *, embedder: str = "", rerank: str = "", mode: Mode = "hybrid") -> Searcher:
    """Opens a store for searching, with the embedder that it was made with.

    Args:
      uri: of the store.
      embedder: a folder or hub name, where the store's embedder lies elsewhere now.
      rerank: a folder or hub name of a cross encoder; none by default.
      mode: of the searches; for text no embedder is loaded.

    Raises:
      RunError, CheckpointError: see `store.open`, `embed.load`, `rerank.load`.
    """
    found = store.open(uri)
    made_with = "" if found.about.embedder == embed.DEFAULT else found.about.embedder
    encoder = None if mode == "text" else embed.load(embedder or made_with)
    second = None
    if rerank:
        from jaxsft.rag import rerank as cross

        second = cross.load(rerank).score
    return Searcher(found, encoder, second)


def _by_words(within: Store, question: str, condition: str, depth: int) -> dict[str, Candidate]:
    # A query object, so that quotation marks, brackets and AND are words as any other.
    words = need("lancedb.query").MatchQuery(question, "text")
    with store.reading(within.uri):
        query = within.passages.search(words, query_type="fts")
        query = query.where(condition) if condition else query
        rows = query.limit(depth).select([*COLUMNS, "_score"]).to_arrow()
    return _candidates(rows, rows["_score"].to_pylist())


def _by_meaning(within: Store, vector: np.ndarray, condition: str, depth: int) -> dict[str, Candidate]:
    with store.reading(within.uri):
        query = within.passages.search(vector, vector_column_name="vector").distance_type("cosine")
        query = query.where(condition) if condition else query
        query = query.nprobes(PROBES).refine_factor(REFINE)
        rows = query.limit(depth).select([*COLUMNS, "_distance"]).to_arrow()
    return _candidates(rows, [0.0] * rows.num_rows)


def _candidates(rows: Any, words: Sequence[float]) -> dict[str, Candidate]:
    dim = rows.schema.field("vector").type.list_size
    flat = rows["vector"].combine_chunks().flatten().to_numpy().reshape(-1, dim)
    found = {}
    for number, row in enumerate(rows.drop_columns(["vector"]).to_pylist()):
        place = {name: row[name] for name in ("title", "heading", "start", "end", "page")}
        tags = dict(tag.split("=", 1) for tag in row["tags"])
        found[row["id"]] = Candidate(
            Passage(row["text"], row["source"], **place, tags=tags), flat[number], words[number]
        )
    return found
