"""The native scan: `pattern_search.mojo` finds the candidates, `scan.nearest` their exact scores.

Scores are compared in the frame of the codes; a constant and a positive factor per query do not matter. With w the
query that a row's product is taken with, step·ŵ its own codes and ŷ a row's:

    |w·y - step·ŵ·ŷ| ≤ |w| |y - ŷ| + |w - step·ŵ| |ŷ|

which with the row's `error` and `size` is its bound; rounding errors of the float32 arithmetic are part of `error`.
"""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from collections import deque
from functools import cache, partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from synapse.errors import InternalError
from synapse.kernels.cache import found_build
from synapse.kernels.checks import load_found
from synapse.kernels.native import FoundBuild
from synapse.kernels.spec import KernelSpec
from synapse.vectors.codes import (
    GROUP,
    Bytes,
    Codes,
    Float32s,
    Metric,
    allocate,
    encode,
    learn_frame,
    lengths,
)
from synapse.vectors.scan import Answer, Rows, Scan, View, agrees, nearest, scan_reference

ROWS_PER_THREAD = 8192
"""A thread is worth waking for this many rows."""
PIECES_PER_THREAD = 16
"""Threads take the rows in so many pieces each, so that one that is slow or late takes fewer."""
ROOM = 8192
"""Rows a call can note for one query before it clears out those that fell below the threshold."""
TILE = 1024
"""Rows the kernel notes between two looks at the room that is left."""
BATCH = 32
"""Queries that share one pass over the codes."""
LOWEST = np.finfo(np.float32).min
TERMS = np.dtype([(name, np.float32) for name in ("step", "total", "norm", "error", "slack", "bias")])


class ScanCall(ctypes.Structure):
    """The `Scan` of pattern_search.mojo, field by field; arrays are addresses."""

    _fields_ = [
        (name, ctypes.c_int64)
        for name in (
            *("lines", "rows", "piece", "queries", "k", "capacity", "call", "calls", "has_bias", "has_mask"),
            *("high", "low", "middle", "scale", "coarse_error", "fine_error", "size", "bias", "mask"),
            *("query_codes", "query_terms", "taken", "thresholds", "limits", "heaps", "heap_sizes"),
            *("found_rows", "found_dots", "found_upper", "found_counts", "settled"),
        )
    ]


class PrepareCall(ctypes.Structure):
    """The `Preparation` of pattern_search_query.mojo, likewise."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("queries", "dimensions", "lines", "is_l2", "is_dot")),
        ("unit", ctypes.c_double),
        *((name, ctypes.c_int64) for name in ("vectors", "centre", "codes", "terms")),
    ]


def address(array: NDArray[Any]) -> int:
    """Where an array's first element is. The array must outlive its use."""
    pointer: int = array.__array_interface__["data"][0]  # a third of the time that array.ctypes.data takes
    return pointer


def declare(library: ctypes.CDLL) -> None:
    """Tell ctypes what the kernel's functions return."""
    library.pattern_search_prepare.restype = None
    library.pattern_search_scan.restype = ctypes.c_int64


def self_test(library: ctypes.CDLL) -> None:
    """Compare the kernel with the reference on small indexes of every metric.

    Raises:
        AssertionError: the answers differ.
    """
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
    return found_build(KERNEL)


def bind(path: Path) -> Scan:
    """The native scan from a library.

    Raises:
        KernelRefused, Unavailable: it does not pass its checks, or they could not be made.
    """
    return partial(scan_native, load_found(KERNEL, path))


KERNEL = KernelSpec(
    name="pattern_search",
    source=Path(__file__).with_name("pattern_search.mojo"),
    symbols=tuple(
        f"pattern_search_{name}" for name in ("abi_version", "struct_size", "cpu_features", "prepare", "scan")
    ),
    abi_version=2,
    self_test=self_test,
    declare=declare,
    structs=(ScanCall, PrepareCall),
    main=Path(__file__).with_name("pattern_search_main.mojo"),
)


def scan_native(library: ctypes.CDLL, view: View, queries: Float32s, k: int, mask: Bytes | None) -> Answer:
    """The same answer as `scan_reference`, from the kernel. Uses one thread per core when there are rows enough.

    Raises:
        InternalError: the kernel reports what it never should.
    """
    if not len(queries) or not k:
        return nearest(view, queries, [np.empty(0, np.intp)] * len(queries), k)
    if len(queries) <= BATCH:
        return nearest(view, queries, _candidates(library, view, queries, k, mask), k)
    batches = [queries[start : start + BATCH] for start in range(0, len(queries), BATCH)]
    answers = [nearest(view, batch, _candidates(library, view, batch, k, mask), k) for batch in batches]
    return np.concatenate([ids for ids, _ in answers]), np.concatenate([scores for _, scores in answers])


def _candidates(library: ctypes.CDLL, view: View, queries: Float32s, k: int, mask: Bytes | None) -> list[Rows]:
    """Rows that hold the k nearest of each query."""
    if k <= ROOM // 4:
        search = _spare_search(library, view, len(queries), k)
        found = search.run(view, queries, mask)
        _spare.append(search)
        if found is not None:
            return found
    every = []
    search = _Search(library, view, 1, k, view.count + TILE)
    for i in range(len(queries)):  # one by one, with room for every row
        one = search.run(view, queries[i : i + 1], mask)
        if one is None:
            raise InternalError("the kernel pattern_search asks for more room than it can need")
        every += one
    return every


def _spare_search(library: ctypes.CDLL, view: View, queries: int, k: int) -> _Search:
    """One that is ready for such a call, else a new one."""
    while True:
        try:
            search = _spare.pop()
        except IndexError:
            return _Search(library, view, queries, k, ROOM)
        if search.fits(library, view, queries, k):
            return search


class _Search:
    """One pass over the codes for some queries, shared by threads, and used again for the next of its kind.

    It is kept because making the arrays and the calls anew would take as long as scanning 20,000 rows.
    """

    def __init__(self, library: ctypes.CDLL, view: View, queries: int, k: int, room: int) -> None:
        count, dimensions = view.count, view.vectors.shape[1]
        lines = view.codes.high.shape[1]
        self._library = library
        self._view = weakref.ref(view)
        self._shape = (queries, k)
        self._codes = np.zeros((queries, 2, lines * 4), np.int8)
        self._terms = np.empty(queries, TERMS)
        calls = max(1, min(threads(), count // ROWS_PER_THREAD))
        self._thresholds = np.empty((calls, queries), np.float32)
        self._taken = np.zeros(1, np.int64)
        self._prepare = PrepareCall(
            *(queries, dimensions, lines, view.metric == "l2", view.metric == "dot", view.frame.unit),
            *(0, address(view.frame.centre), address(self._codes), address(self._terms)),
        )
        self._limits = np.empty((calls, queries), np.float32)
        self._heaps = np.empty((calls, queries, k), np.float32)
        self._counts = np.empty((calls, 3, queries), np.int32)  # found, settled, in the heap
        self._rows = np.empty((calls, queries, room), np.int32)
        self._dots = np.empty((calls, queries, room), np.int32)
        self._upper = np.empty((calls, queries, room), np.float32)
        piece = max(1, -(-count // GROUP) // (PIECES_PER_THREAD * calls))
        numbers = (lines, count, piece, queries, k, room)
        self._calls = [
            ScanCall(*numbers, call, calls, view.metric == "l2", False, *self._arrays(view.codes, call))
            for call in range(calls)
        ]
        self._lock = threading.Lock()
        self._at_work = 0
        self._over = True
        self._held: object = None
        self._ended: SimpleQueue[int | BaseException] = SimpleQueue()

    def _arrays(self, codes: Codes, call: int) -> list[int]:
        inputs = (codes.high, codes.low, codes.middle, codes.scale, codes.coarse_error, codes.fine_error, codes.size)
        shared = (codes.bias, codes.bias, self._codes, self._terms, self._taken, self._thresholds)
        found, settled, in_heap = self._counts[call]
        own = (self._limits[call], self._heaps[call], in_heap, self._rows[call], self._dots[call], self._upper[call])
        return [address(array) for array in (*inputs, *shared, *own, found, settled)]

    def fits(self, library: ctypes.CDLL, view: View, queries: int, k: int) -> bool:
        """Whether it was made for such a call."""
        return self._library is library and self._view() is view and self._shape == (queries, k)

    def run(self, view: View, queries: Float32s, mask: Bytes | None) -> list[Rows] | None:
        """The rows that could be among the nearest, for each query; None when there was not room for them."""
        self._held = (view, queries, mask)  # for helpers that outlive a run that was interrupted
        self._prepare.vectors = address(queries)
        self._library.pattern_search_prepare(ctypes.byref(self._prepare))
        self._thresholds.fill(LOWEST)
        self._taken[0] = 0
        for call in self._calls:
            call.has_mask = mask is not None
            call.mask = 0 if mask is None else address(mask)
        with self._lock:
            self._at_work, self._over = 1, False
        for _ in self._calls[1:]:
            _helpers().put(self)
        self._work(0)
        with self._lock:
            self._over = True  # a helper that has not begun has nothing left to do
            begun = self._at_work
        ended = [self._ended.get() for _ in range(begun)]
        self._held = None
        for status in ended:
            if isinstance(status, BaseException):
                raise status
        if any(ended):
            return None
        limits = self._thresholds.max(axis=0).tolist()
        return [self._found(query, begun, limits[query]) for query in range(len(queries))]

    def _found(self, query: int, calls: int, limit: float) -> Rows:
        parts = []
        for call in range(calls):
            count = self._counts[call, 0, query]
            rows = self._rows[call, query, :count]
            parts.append(rows[self._upper[call, query, :count] >= limit])
        return np.concatenate(parts).astype(np.intp)

    def help(self) -> None:
        """Take pieces of the rows, on another thread, if there is still something to do."""
        with self._lock:
            call = self._at_work
            if self._over or call == len(self._calls):
                return
            self._at_work += 1
        self._work(call)

    def _work(self, call: int) -> None:
        try:
            self._ended.put(self._library.pattern_search_scan(ctypes.byref(self._calls[call])))
        except BaseException as error:
            self._ended.put(error)


_spare: deque[_Search] = deque(maxlen=4)


def threads() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def _helpers() -> SimpleQueue[_Search]:
    """The queue from which one thread per further core takes searches to help with."""
    queue: SimpleQueue[_Search] = SimpleQueue()

    def serve() -> None:
        while True:
            queue.get().help()

    for number in range(threads() - 1):
        threading.Thread(target=serve, name=f"pattern-search-{number}", daemon=True).start()
    return queue


os.register_at_fork(after_in_child=_helpers.cache_clear)  # a forked child has none of the threads
