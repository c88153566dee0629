"""What retrieval costs: texts into a store, questions answered, and a million vectors.

    python benchmarks/rag.py
    python benchmarks/rag.py --texts 200 --vectors 20000 --queries 20

Ingest: texts of 100 words of the project's own documentation are embedded and written, then asked for one at a time,
beside sentence-transformers and FAISS (IndexFlatIP) with the same embedder, the two in turns, each in a process of its
own. Vectors: of 384 numbers, random or in a thousand clusters; p50 and p99 of single questions for the ten nearest,
how many of the truly nearest ten were found, and the most memory (RSS) that the process has had.

Clustered vectors on two CPU cores that other work kept busy, so that times are rough and several times too long:

                          p50 ms  p99 ms  recall@10  built, s
   20,000  lance              19      28      1.000         3
   20,000  ivf_sq              5       9      1.000         3
   20,000  jax                 6      13      1.000         1
1,000,000  lance           3,394   5,456      1.000        36
1,000,000  ivf_flat           39     146      1.000        93
1,000,000  ivf_sq             21      92      1.000        49

A whole search by meaning among 200,000 passages took 0.20 to 0.34 s without an index and 0.03 to 0.14 s with ivf_sq on
the same busy cores, which is where `index.VECTORS` stands.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
DIM, NEAREST, ROWS, CLUSTERS = 384, 10, 50_000, 1000


def texts(count: int, words: int = 100) -> list[str]:
    known = " ".join(file.read_text(encoding="utf-8") for file in sorted((ROOT / "docs").glob("*.md"))).split()
    draw = np.random.default_rng(0)
    starts = draw.integers(0, len(known) - words, count)
    return [f"{number}. {' '.join(known[at : at + words])}" for number, at in enumerate(starts)]


def peak() -> int:
    """The most bytes that this process has had in memory."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def timed(ask: Callable[[int], object], count: int) -> dict[str, float]:
    """Milliseconds of single questions, after one that does not count."""
    ask(0)
    times = []
    for number in range(count):
        start = time.perf_counter()
        ask(number)
        times.append(1e3 * (time.perf_counter() - start))
    return {"p50": statistics.median(times), "p99": float(np.quantile(times, 0.99))}


def ours(count: int, questions: int, embedder: str) -> dict[str, float]:
    from jaxsft.rag import embed, index, store
    from jaxsft.rag.search import Searcher

    made = embed.load(embedder)
    given = texts(count)
    made.documents(given[:64])
    with tempfile.TemporaryDirectory() as folder:
        docs = Path(folder, "docs")
        docs.mkdir()
        (docs / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in given))
        about = store.About(made.name, made.digest, made.dim, made.max_tokens, 0)
        into, start = store.create(f"{folder}/store", about), time.perf_counter()
        outcome = index.update(into, docs, made)
        seconds = time.perf_counter() - start
        found = Searcher(into, made)
        asked = {mode: timed(lambda i, mode=mode: found.find(given[i][:80], mode=mode), questions) for mode in MODES}
    times = {f"{mode}_{name}": value for mode, values in asked.items() for name, value in values.items()}
    return {"texts_s": outcome.passages / seconds, "peak": peak(), **times}


MODES = ("dense", "text", "hybrid")


def peer(count: int, questions: int, embedder: str) -> dict[str, float]:
    import faiss
    from sentence_transformers import SentenceTransformer

    from jaxsft.rag import embed

    model = SentenceTransformer(embedder or str(embed.default()), device="cpu")
    encode = lambda given: model.encode(given, normalize_embeddings=True, show_progress_bar=False)
    given = texts(count)
    encode(given[:64])
    start = time.perf_counter()
    index = faiss.IndexFlatIP(model.get_sentence_embedding_dimension())
    index.add(encode(given))
    seconds = time.perf_counter() - start
    times = timed(lambda i: index.search(encode([given[i][:80]]), NEAREST), questions)
    return {"texts_s": count / seconds, "peak": peak(), **{f"dense_{name}": value for name, value in times.items()}}


def blocks(kind: str, count: int, dim: int, seed: int = 0) -> Iterator[np.ndarray]:
    """Unit vectors, a part at a time."""
    centres = np.random.default_rng(1).standard_normal((CLUSTERS, dim), np.float32)
    draw = np.random.default_rng(seed)
    for start in range(0, count, ROWS):
        rows = min(ROWS, count - start)
        found = draw.standard_normal((rows, dim), np.float32)
        if kind == "clustered":
            found = 0.7 * found + centres[draw.integers(0, CLUSTERS, rows)]
        yield found / np.linalg.norm(found, axis=1, keepdims=True)


def vectors(kind: str, way: str, count: int, questions: int, dim: int = DIM) -> dict[str, float]:
    """One way to find the nearest of some vectors.

    Args:
      kind: random or clustered.
      way: lance, ivf_flat, ivf_sq, ivf_pq, ivf_rq (LanceDB without and with an index), jax, jax_bfloat16 (rag.exact).
      count, questions, dim: how many of them, how many questions, and how wide.
    """
    asked = next(blocks(kind, questions, dim, seed=2))
    truth, best = np.zeros((questions, 0), np.int64), np.zeros((questions, 0), np.float32)
    for number, block in enumerate(blocks(kind, count, dim)):  # an independent search, a block at a time
        best = np.concatenate([best, asked @ block.T], axis=1)
        truth = np.concatenate([truth, np.tile(number * ROWS + np.arange(len(block)), (questions, 1))], axis=1)
        order = np.argsort(-best, axis=1)[:, :NEAREST]
        best, truth = np.take_along_axis(best, order, 1), np.take_along_axis(truth, order, 1)
    by = by_jax if way.startswith("jax") else by_lance
    with tempfile.TemporaryDirectory() as folder:
        before, start = peak(), time.perf_counter()
        ask = by(kind, way, count, dim, asked, folder)
        built = time.perf_counter() - start
        times = timed(ask, questions)
        found = [len(set(ask(i)) & set(truth[i].tolist())) / NEAREST for i in range(questions)]
    return {"build_s": built, "recall": float(np.mean(found)), "grew": peak() - before, **times}


def by_jax(kind: str, way: str, count: int, dim: int, asked: np.ndarray, _: str) -> Callable[[int], list[int]]:
    from jaxsft.rag import exact

    matrix = np.concatenate(list(blocks(kind, count, dim)))
    placed = exact.place(matrix, dtype="bfloat16" if way == "jax_bfloat16" else "float32")
    return lambda i: exact.nearest(placed, asked[i : i + 1], NEAREST)[1][0].tolist()


def by_lance(kind: str, way: str, count: int, dim: int, asked: np.ndarray, folder: str) -> Callable[[int], list[int]]:
    import lancedb
    import pyarrow as pa
    from lancedb import index

    from jaxsft.rag import search

    schema = pa.schema([("number", pa.int64()), ("vector", pa.list_(pa.float32(), dim))])
    table = lancedb.connect(folder).create_table("vectors", schema=schema)
    for number, block in enumerate(blocks(kind, count, dim)):
        flat = pa.FixedSizeListArray.from_arrays(pa.array(block.ravel()), dim)
        table.add(pa.table({"number": number * ROWS + np.arange(len(block)), "vector": flat}, schema=schema))
    made = {"ivf_flat": index.IvfFlat, "ivf_sq": index.IvfSq, "ivf_pq": index.IvfPq, "ivf_rq": index.IvfRq}
    if way in made:
        table.create_index("vector", config=made[way](distance_type="cosine"))

    def ask(i: int) -> list[int]:
        query = table.search(asked[i], vector_column_name="vector").distance_type("cosine").limit(NEAREST)
        query = query.nprobes(search.PROBES).refine_factor(search.REFINE)
        return query.select(["number", "_distance"]).to_arrow()["number"].to_pylist()

    return ask


def process(*words: object) -> dict[str, float] | None:
    """Runs one part of this file in a process of its own; None where it cannot be."""
    command = [sys.executable, __file__, "--part", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        print(f"{' '.join(map(str, words))}: not run ({done.stderr.strip().splitlines()[-1]})")
        return None
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=2000, help="how many are embedded; 0 leaves that out")
    parser.add_argument("--vectors", type=int, nargs="*", default=[100_000, 1_000_000], help="how many; none: left out")
    parser.add_argument("--kinds", nargs="*", default=["random", "clustered"])
    parser.add_argument("--ways", nargs="*", default=["lance", "ivf_flat", "ivf_sq", "ivf_pq", "jax", "jax_bfloat16"])
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=2, help="of the systems in turns")
    parser.add_argument("--embedder", default="", help="a folder; the default embedder otherwise")
    parser.add_argument("--part", nargs="*", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.part:
        name, *words = given.part
        if name == "vectors":
            kind, way, *numbers = words
            print(json.dumps(vectors(kind, way, *map(int, numbers))))
        else:
            count, questions, *embedder = words
            print(json.dumps({"ours": ours, "peer": peer}[name](int(count), int(questions), *(embedder or [""]))))
        return
    for _ in range(given.rounds if given.texts else 0):
        for name, label in (("ours", "jaxsft"), ("peer", "sentence-transformers, FAISS")):
            found = process(name, given.texts, given.queries, *([given.embedder] if given.embedder else []))
            if found:
                times = ", ".join(f"{key} {value:.1f} ms" for key, value in found.items() if key[-3:] in ("p50", "p99"))
                print(f"{label:30} {found['texts_s']:7.0f} texts/s  {found['peak'] / 1e6:6.0f} MB  {times}", flush=True)
    for count in given.vectors:
        for kind in given.kinds:
            for way in given.ways:
                if found := process("vectors", kind, way, count, given.queries):
                    print(
                        f"{count:9,} {kind:10} {way:13} p50 {found['p50']:7.1f} ms  p99 {found['p99']:7.1f} ms  "
                        f"recall@10 {found['recall']:.3f}  built {found['build_s']:6.1f} s  grew "
                        f"{found['grew'] / 1e6:6.0f} MB",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
