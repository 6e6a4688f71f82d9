"""Exact search among vectors, against the libraries a user would pick instead, in one run.

    python -m benchmarks.pattern_search --json [--rows 200000 1000000] [--quick]

Every contender finds the 10 nearest by inner product of the same float32 vectors with two threads. They take turns,
query by query, so a machine that slows down slows all, and the median of the rounds counts. The ids of every query
are compared with a brute force that shares no code with the index.
"""

from __future__ import annotations

import heapq
import os
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from typing import Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from benchmarks.report import Report, parser, publish, read_bandwidth
from synapse.config import load_settings
from synapse.kernels.cache import find_build, load_build
from synapse.vectors.index import PatternIndex
from synapse.vectors.kernel import KERNEL, scan_native
from synapse.vectors.scan import scan_reference

K = 10
DIMENSIONS = 384
THREADS = 2
BATCH = 32
PLAIN_ROWS = 2000
PAUSE = 0.05
"""Seconds before each call. BLAS and OpenMP threads go on spinning for a while, in the way of whoever comes next."""
HNSW_ROWS = 200_000

Vectors = NDArray[np.float32]
Search = Callable[[Vectors], NDArray[np.int64]]
"""Queries [n, DIMENSIONS] to ids [n, K], best first."""


def uniform(rows: int, random: np.random.Generator) -> Vectors:
    """Every direction alike: the hardest case for anything that prunes."""
    return normalised(random.uniform(-1, 1, (rows, DIMENSIONS)).astype(np.float32))


def clustered(rows: int, random: np.random.Generator) -> Vectors:
    """Like text embeddings: a common mean, topics of very different sizes, variance that falls with the dimension."""
    spectrum = (1 / np.sqrt(np.arange(1, DIMENSIONS + 1))).astype(np.float32)
    topics = random.standard_normal((1000, DIMENSIONS), np.float32) * spectrum
    mean = 0.3 * random.standard_normal(DIMENSIONS, np.float32) * spectrum
    sizes = 1 / np.arange(1, len(topics) + 1)
    topic = random.choice(len(topics), rows, p=sizes / sizes.sum())
    vectors = np.empty((rows, DIMENSIONS), np.float32)
    for start in range(0, rows, 50_000):
        part = topic[start : start + 50_000]
        noise = random.standard_normal((len(part), DIMENSIONS), np.float32)
        vectors[start : start + 50_000] = mean + topics[part] + 0.7 * noise * spectrum
    rotation = np.linalg.qr(random.standard_normal((DIMENSIONS, DIMENSIONS)))[0].astype(np.float32)
    return normalised(vectors @ rotation)


DATA: dict[str, Callable[[int, np.random.Generator], Vectors]] = {"clustered": clustered, "uniform": uniform}


def normalised(vectors: Vectors) -> Vectors:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def brute_force(vectors: Vectors, queries: Vectors) -> NDArray[np.int64]:
    """The ids of the K nearest, from float32 products and, near the K-th, float64 ones; ties by id."""
    found = np.empty((len(queries), K), np.int64)
    margin = 1e-4  # of float32 products of unit vectors of 384 dimensions; their error bound is 2.3e-5
    for start in range(0, len(queries), BATCH):
        scores = queries[start : start + BATCH] @ vectors.T
        for i, row in enumerate(scores, start):
            threshold = np.partition(row, len(row) - K)[len(row) - K] - margin
            near = np.flatnonzero(row >= threshold)
            exact = (vectors[near].astype(np.float64) @ queries[i].astype(np.float64)).astype(np.float32)
            found[i] = near[np.lexsort((near, -exact))[:K]]
    return found


def with_numpy(vectors: Vectors) -> Search:
    def search(queries: Vectors) -> NDArray[np.int64]:
        return best_rows(queries @ vectors.T if len(queries) > 1 else (vectors @ queries[0])[None])

    return search


def best_rows(scores: Vectors) -> NDArray[np.int64]:
    near = np.argpartition(scores, -K, axis=1)[:, -K:]
    order = np.argsort(-np.take_along_axis(scores, near, axis=1), axis=1)
    return np.take_along_axis(near, order, axis=1)


def with_faiss(vectors: Vectors) -> Search:
    import faiss

    faiss.omp_set_num_threads(THREADS)
    index = faiss.IndexFlatIP(DIMENSIONS)
    index.add(vectors)
    return lambda queries: index.search(queries, K)[1]


def with_usearch(vectors: Vectors) -> Search:
    from usearch.index import MetricKind, search

    return lambda queries: np.atleast_2d(
        search(vectors, queries, K, MetricKind.IP, exact=True, threads=THREADS).keys.astype(np.int64)
    )


def with_numkong(vectors: Vectors) -> Search:
    import numkong

    pool = ThreadPoolExecutor(THREADS)
    parts = np.array_split(vectors, THREADS)

    def products(queries: Vectors, part: Vectors) -> Any:
        return np.asarray(numkong.cdist(queries, part, metric="dot", out_dtype="float32"))

    def search(queries: Vectors) -> NDArray[np.int64]:
        scores = np.concatenate(list(pool.map(partial(products, queries), parts)), axis=1)
        return best_rows(scores)

    return search


PEERS = {
    "NumPy": with_numpy,
    "FAISS IndexFlatIP": with_faiss,
    "usearch exact": with_usearch,
    "NumKong": with_numkong,
}


def take_turns(contenders: dict[str, Search], queries: Vectors, batch: int, rounds: int) -> dict[str, float]:
    """Median milliseconds of a call with `batch` queries, each contender once a round, in a new order every round."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for turn in range(rounds + 1):
        asked = queries[(turn * batch + np.arange(batch)) % len(queries)]
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            time.sleep(PAUSE)
            start = time.perf_counter()
            contenders[name](asked)
            if turn:  # the first round warms up
                times[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def plain_python(vectors: Vectors, query: Vectors) -> float:
    """Milliseconds for all rows of the loop that the seeds' 13.1 is relative to, measured on `PLAIN_ROWS` of them."""
    rows, q = vectors[:PLAIN_ROWS].tolist(), query.tolist()
    start = time.perf_counter()
    scores = ((sum(a * b for a, b in zip(q, row, strict=True)), i) for i, row in enumerate(rows))
    heapq.nlargest(K, scores)
    return (time.perf_counter() - start) * 1e3 * len(vectors) / len(rows)


def with_hnsw(vectors: Vectors, queries: Vectors, truth: NDArray[np.int64]) -> list[dict[str, Any]]:
    """Build time, recall and milliseconds of the approximate indexes, with 32 links and a search width of 64."""
    import faiss
    from usearch.index import Index

    rows = []
    start = time.perf_counter()
    graph = faiss.IndexHNSWFlat(DIMENSIONS, 32, faiss.METRIC_INNER_PRODUCT)
    graph.hnsw.efSearch = 64
    graph.add(vectors)
    built = time.perf_counter() - start
    rows.append(approximate("FAISS HNSW", built, lambda q: graph.search(q, K)[1], queries, truth))
    start = time.perf_counter()
    index = Index(ndim=DIMENSIONS, metric="ip", dtype="f32", connectivity=32, expansion_search=64)
    index.add(np.arange(len(vectors)), vectors, threads=THREADS)
    built = time.perf_counter() - start
    search = partial(index.search, count=K, threads=THREADS)
    rows.append(approximate("usearch HNSW", built, lambda q: np.atleast_2d(search(q).keys), queries, truth))
    return rows


def approximate(name: str, built: float, search: Search, queries: Vectors, truth: NDArray[np.int64]) -> dict[str, Any]:
    found, times = [], []
    for query in queries:
        start = time.perf_counter()
        found.append(search(query[None])[0])
        times.append((time.perf_counter() - start) * 1e3)
    hits = sum(len(set(map(int, a)) & set(map(int, b))) for a, b in zip(found, truth, strict=True))
    return {
        "index": name,
        "build_s": built,
        "one_query_ms": statistics.median(times),
        f"recall@{K}": hits / truth.size,
    }


@contextmanager
def two_threads() -> Iterator[None]:
    with threadpool_limits(THREADS):
        yield


def measure(report: Report, kind: str, rows: int, args: Any, scan: Any) -> None:
    random = np.random.default_rng(7)
    everything = DATA[kind](rows + args.queries, random)
    vectors, queries = everything[:rows].copy(), everything[rows:].copy()
    del everything
    start = time.perf_counter()
    index = PatternIndex(DIMENSIONS, "dot", scan=scan)
    index.add(np.arange(rows), vectors)
    built = time.perf_counter() - start
    truth = brute_force(vectors, queries)
    found = np.concatenate([index.search(queries[i : i + BATCH], K)[0] for i in range(0, len(queries), BATCH)])
    identical = int((found == truth).all(axis=1).sum())

    contenders: dict[str, Search] = {"Synapse": lambda q: index.search(q, K)[0]}
    contenders |= {name: make(vectors) for name, make in PEERS.items()}
    bandwidth = read_bandwidth()
    one = take_turns(contenders, queries, 1, args.rounds)
    many = take_turns(contenders, queries, BATCH, max(3, args.rounds // 5))
    name = f"{kind}, {rows:,} x {DIMENSIONS}"
    report.rows[name] = [
        {
            "contender": contender,
            "one_query_ms": one[contender],
            "one_ratio": one[contender] / one["Synapse"],
            "batch_of_32_ms": many[contender],
            "batch_ratio": many[contender] / many["Synapse"],
        }
        for contender in contenders
    ]
    bandwidth = max(bandwidth, read_bandwidth())  # before and after, since other programs may be in the way
    codes = index._current().codes  # the bytes that every search has to read
    scanned = codes.high.nbytes + 4 * codes.middle.nbytes
    limit = scanned / bandwidth * 1e3
    plain = plain_python(vectors, queries[0])
    report.figures |= {
        f"{name}: ids identical to brute force, of {len(queries)} queries": identical,
        f"{name}: ratio to the best peer, one query": min(one[peer] for peer in PEERS) / one["Synapse"],
        f"{name}: ratio to the best peer, {BATCH} queries": min(many[peer] for peer in PEERS) / many["Synapse"],
        f"{name}: ratio to plain Python (scaled from {PLAIN_ROWS} rows)": plain / one["Synapse"],
        f"{name}: MB that every search reads": scanned / 1e6,
        f"{name}: memory bandwidth, GB/s": bandwidth / 1e9,
        f"{name}: memory limit of one query, ms": limit,
        f"{name}: share of the memory limit reached": limit / one["Synapse"],
        f"{name}: build, s": built,
        f"{name}: bytes per vector, float32 vector included": index.nbytes / rows,
    }
    if args.hnsw and rows <= HNSW_ROWS:
        report.rows[f"{name}: approximate indexes"] = with_hnsw(vectors, queries, truth)


def main() -> None:
    options = parser("Exact vector search against NumPy, FAISS, usearch and NumKong.")
    options.add_argument("--rows", type=int, nargs="+", default=[200_000, 1_000_000])
    options.add_argument("--data", nargs="+", choices=list(DATA), default=list(DATA))
    options.add_argument("--queries", type=int, default=1000, help="queries whose ids are compared")
    options.add_argument("--rounds", type=int, default=25)
    options.add_argument("--no-hnsw", dest="hnsw", action="store_false", help=f"else up to {HNSW_ROWS:,} rows")
    options.add_argument("--quick", action="store_true", help="20,000 rows, 100 queries, for a look")
    args = options.parse_args()
    if args.quick:
        args.rows, args.queries, args.rounds = [20_000], 100, 10
    build = find_build(KERNEL, load_settings())
    scan = partial(scan_native, load_build(KERNEL, build)) if build else scan_reference
    report = Report(
        "pattern search",
        settings={
            "k": K,
            "threads": THREADS,
            "metric": "inner product of unit vectors",
            "kernel": build.build_id[:12] if build else "none: the reference",
            "load before": round(os.getloadavg()[0], 2),
        }
        | {name: version(name) for name in ("numpy", "faiss-cpu", "usearch", "numkong")},
    )
    with two_threads():
        for rows in args.rows:
            for kind in args.data:
                measure(report, kind, rows, args, scan)
    publish(report, as_json=args.json)


if __name__ == "__main__":
    main()
