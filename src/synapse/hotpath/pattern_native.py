"""The native scan: `pattern_search.mojo` finds the candidates, `pattern_scan.nearest` their exact scores.

Scores are compared in the frame of the codes; a constant and a positive factor per query do not matter. With w the
query that a row's product is taken with, step·ŵ its own codes and ŷ a row's:

    |w·y - step·ŵ·ŷ| ≤ |w| |y - ŷ| + |w - step·ŵ| |ŷ|

which with the row's `error` and `size` is its bound; rounding errors of the float32 arithmetic are part of `error`.
"""

from __future__ import annotations

import ctypes
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from synapse.config import load_settings
from synapse.errors import InternalError, NotFound
from synapse.hotpath.kernels import KernelBuild, KernelSpec, find_build, load_build
from synapse.hotpath.native import FoundBuild
from synapse.hotpath.pattern_codes import (
    GROUP,
    SCORE_SLACK,
    SCORE_UNDERFLOW,
    Bytes,
    Float32s,
    Metric,
    allocate,
    encode,
    learn_frame,
    lengths,
    round_up,
)
from synapse.hotpath.pattern_scan import Answer, Rows, Scan, View, agrees, nearest, scan_reference

ROWS_PER_PART = 8192
"""At least so many rows are given to a thread at a time."""
PARTS_PER_THREAD = 4
ROOM = 8192
"""Rows a call can note for one query before it clears out those that fell below the threshold."""
TILE = 1024
"""Rows the kernel notes between two looks at the room that is left."""
BATCH = 32
"""Queries that share one pass over the codes."""
LOWEST = np.finfo(np.float32).min
TERMS = np.dtype([(name, np.float32) for name in ("step", "total", "norm", "error", "slack", "bias")])
NUMBERS = ("lines", "first", "last", "queries", "k", "capacity", "part", "parts", "has_bias", "has_mask")
ARRAYS = (
    *("high", "low", "middle", "scale", "coarse_error", "fine_error", "size", "bias", "mask"),
    *("query_codes", "query_terms", "thresholds", "limits", "heaps", "heap_sizes"),
    *("found_rows", "found_dots", "found_upper", "found_counts", "settled"),
)


class ScanCall(ctypes.Structure):
    """The `Scan` of pattern_search.mojo, field by field; pointers are addresses."""

    _fields_ = [(name, ctypes.c_int64) for name in (*NUMBERS, *ARRAYS)]


def self_test(library: ctypes.CDLL) -> None:
    """Compare the kernel with the reference on small indexes of every metric.

    Raises:
        AssertionError: the answers differ.
    """
    library.pattern_search_scan.restype = ctypes.c_int64
    for view, queries, k, mask in examples():
        if not agrees(scan_native(library, view, queries, k, mask), scan_reference(view, queries, k, mask)):
            raise AssertionError(f"another answer than the reference with {view.metric}, {view.count} rows")


def examples() -> list[tuple[View, Float32s, int, Bytes | None]]:
    """Small calls that use every part of the kernel; what a new build must answer like the reference."""
    random = np.random.default_rng(20)
    calls: list[tuple[View, Float32s, int, Bytes | None]] = []
    metrics: tuple[Metric, ...] = get_args(Metric)
    for metric, rows, dimensions in zip(metrics, (1000, 300, 77), (70, 384, 5), strict=True):
        vectors = random.standard_normal((rows, dimensions), np.float32)
        frame, codes = learn_frame(vectors, metric), allocate(rows, dimensions)
        encode(codes, 0, vectors, frame, metric)
        norms = lengths(vectors.astype(np.float64))
        view = View(metric, rows, rows, np.arange(rows), vectors, norms, codes, frame, None)
        queries = random.standard_normal((5, dimensions), np.float32)
        calls += [(view, queries, 10, None), (view, queries[:1], 3, random.integers(0, 2, rows).astype(np.uint8))]
    return calls


def find() -> FoundBuild:
    """The build of this machine.

    Raises:
        NotFound: there is none.
    """
    build = find_build(KERNEL, load_settings())
    if build is None:
        raise NotFound("the kernel pattern_search is not built", hint="synapse kernels build pattern_search")
    return FoundBuild(build.build_id, build.path)


def bind(path: Path) -> Scan:
    """The native scan from a library.

    Raises:
        KernelRefused: it does not pass its checks.
    """
    return partial(scan_native, load_build(KERNEL, KernelBuild(KERNEL.name, "", path)))


KERNEL = KernelSpec(
    name="pattern_search",
    source=Path(__file__).with_name("pattern_search.mojo"),
    symbols=("pattern_search_abi_version", "pattern_search_scan"),
    abi_version=1,
    self_test=self_test,
    main=Path(__file__).with_name("pattern_search_main.mojo"),
)


def scan_native(library: ctypes.CDLL, view: View, queries: Float32s, k: int, mask: Bytes | None) -> Answer:
    """The same answer as `scan_reference`, from the kernel. Uses one thread per core when there are rows enough.

    Raises:
        InternalError: the kernel reports what it never should.
    """
    if not len(queries) or not k:
        return nearest(view, queries, [np.empty(0, np.intp)] * len(queries), k)
    batches = [queries[start : start + BATCH] for start in range(0, len(queries), BATCH)]
    answers = [nearest(view, batch, _candidates(library, view, batch, k, mask), k) for batch in batches]
    return np.concatenate([ids for ids, _ in answers]), np.concatenate([scores for _, scores in answers])


def _candidates(library: ctypes.CDLL, view: View, queries: Float32s, k: int, mask: Bytes | None) -> list[Rows]:
    """Rows that hold the k nearest of each query. Threads take parts of the rows in turn, so a slow one takes fewer."""
    codes, terms = prepare(view, queries)
    parts = max(1, min(PARTS_PER_THREAD * threads(), view.count // ROWS_PER_PART))
    groups = -(-view.count // GROUP)
    bounds = [min(view.count, GROUP * (groups * part // parts)) for part in range(parts + 1)]
    thresholds = np.full((parts, len(queries)), LOWEST, np.float32)
    search = _Search(library, view, codes, terms, thresholds, k, mask, bounds, iter(range(parts)))
    others = [_pool().submit(search.work) for _ in range(min(threads(), parts) - 1)]
    found = search.work()
    for other in others:
        if not other.cancel():  # one that has not begun has nothing left to do
            found += other.result()
    limits = thresholds.max(axis=0)
    return [
        np.concatenate([rows[i][upper[i] >= limit] for rows, upper in found]).astype(np.intp)
        for i, limit in enumerate(limits)
    ]


def prepare(view: View, queries: Float32s) -> tuple[NDArray[np.int8], NDArray[np.void]]:
    """Codes [queries, 2, dimensions / 2] of int8, and `TERMS` of each query."""
    q = queries.astype(np.float64)
    frame = view.frame
    bias = np.ones(len(q))
    slack = np.full(len(q), 1e-30)  # underflow in float32
    if view.metric == "l2":
        w = (q - frame.centre) / frame.unit
        bias = 1 / np.maximum(1.0, lengths(w))
        w *= bias[:, None]
        slack += SCORE_SLACK * lengths(w) ** 2 / bias + SCORE_UNDERFLOW * bias / frame.unit**2
    else:
        norms = lengths(q)
        w = q / np.where(norms > 0, norms, 1.0)[:, None]
        slack += SCORE_UNDERFLOW / frame.unit / (np.maximum(norms, 1e-300) if view.metric == "dot" else 1.0)
    step = np.maximum(np.abs(w).max(axis=1) / 127, 1e-30).astype(np.float32)
    exact_step = step.astype(np.float64)[:, None]
    levels = np.rint(w / exact_step).clip(-127, 127)
    terms = np.empty(len(q), TERMS)
    terms["step"] = step
    terms["total"] = step * levels.sum(axis=1)
    terms["norm"] = round_up(lengths(w) * (1 + 2.0**-20))
    terms["error"] = round_up(lengths(w - exact_step * levels) * (1 + 2.0**-20))
    terms["slack"] = round_up(np.minimum(slack, 1e30) * (1 + 2.0**-20))
    terms["bias"] = bias
    padded = np.zeros((len(q), view.codes.low.shape[1] * 2), np.int8)
    padded[:, : levels.shape[1]] = levels
    halves = padded.reshape(len(q), -1, 2, 4).transpose(0, 2, 1, 3)
    return np.ascontiguousarray(halves).reshape(len(q), 2, -1), terms


class _Scratch:
    """The arrays a call writes, kept for the next call: fresh memory costs more than the scan of a small index."""

    def __init__(self, queries: int, k: int, room: int) -> None:
        self.shape = (queries, k, room)
        self.counts = np.empty((3, queries), np.int32)  # found, settled, in the heap
        self.limits = np.empty(queries, np.float32)
        self.heaps = np.empty((queries, k), np.float32)
        self.rows = np.empty((queries, room), np.int32)
        self.dots = np.empty((queries, room), np.int32)
        self.upper = np.empty((queries, room), np.float32)


_spare: deque[_Scratch] = deque(maxlen=16)


@contextmanager
def _scratch(queries: int, k: int, room: int) -> Iterator[_Scratch]:
    try:
        scratch = _spare.pop()
    except IndexError:
        scratch = _Scratch(queries, k, room)
    if scratch.shape != (queries, k, room):
        scratch = _Scratch(queries, k, room)
    yield scratch
    if room == ROOM:
        _spare.append(scratch)


Found = tuple[list[NDArray[np.int32]], list[Float32s]]
"""Rows, and their upper bounds, of each query."""


@dataclass(frozen=True, slots=True)
class _Search:
    """One pass over the codes for some queries. `parts` gives out the numbers of the parts that nobody works on yet."""

    library: ctypes.CDLL
    view: View
    query_codes: NDArray[np.int8]
    terms: NDArray[np.void]
    thresholds: Float32s
    k: int
    mask: Bytes | None
    bounds: list[int]
    parts: Iterator[int]

    def work(self) -> list[Found]:
        """Scan parts until none is left."""
        if self.k > ROOM // 4:
            return [self._run_with_room(part) for part in self.parts]
        with _scratch(len(self.terms), self.k, ROOM) as scratch:
            call = self._call(scratch)
            return [self._run(call, scratch, part) or self._run_with_room(part) for part in self.parts]

    def _run_with_room(self, part: int) -> Found:
        """Scan a part with room for each of its rows."""
        scratch = _Scratch(len(self.terms), self.k, self.bounds[part + 1] - self.bounds[part] + TILE)
        found = self._run(self._call(scratch), scratch, part)
        if found is None:
            raise InternalError("the kernel pattern_search asks for more room than it can need")
        return found

    def _run(self, call: ScanCall, scratch: _Scratch, part: int) -> Found | None:
        """Scan a part; None when there was not room enough."""
        call.part, call.first, call.last = part, self.bounds[part], self.bounds[part + 1]
        scratch.counts.fill(0)
        self.thresholds.max(axis=0, out=scratch.limits)
        if self.library.pattern_search_scan(ctypes.byref(call)):
            return None
        counts = scratch.counts[0].tolist()
        rows = [scratch.rows[i, :count].copy() for i, count in enumerate(counts)]
        return rows, [scratch.upper[i, :count].copy() for i, count in enumerate(counts)]

    def _call(self, scratch: _Scratch) -> ScanCall:
        codes, mask = self.view.codes, self.mask
        found, settled, in_heap = scratch.counts
        inputs = (codes.high, codes.low, codes.middle, codes.scale, codes.coarse_error, codes.fine_error, codes.size)
        outputs = (scratch.rows, scratch.dots, scratch.upper, found, settled)
        arrays = (
            *(*inputs, codes.bias, codes.bias if mask is None else mask, self.query_codes, self.terms),
            *(self.thresholds, scratch.limits, scratch.heaps, in_heap, *outputs),
        )
        return ScanCall(
            lines=codes.high.shape[1],
            queries=len(self.terms),
            k=self.k,
            capacity=scratch.shape[2],
            parts=len(self.thresholds),
            has_bias=self.view.metric == "l2",
            has_mask=mask is not None,
            **{name: array.ctypes.data for name, array in zip(ARRAYS, arrays, strict=True)},
        )


def threads() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max(1, threads() - 1), thread_name_prefix="pattern-search")


os.register_at_fork(after_in_child=_pool.cache_clear)  # a forked child has none of the threads
