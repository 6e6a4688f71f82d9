"""An exact index of vectors: the k nearest of some hundreds of thousands, as fast as few bytes can be read.

`scan.py` defines the scores and how the nearest are found; `codes.py` the codes that make it fast.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Self, get_args

import numpy as np
from numpy.typing import ArrayLike

from synapse.errors import Conflict, InvalidInput, NotFound
from synapse.hotpath.paths import hotpath
from synapse.kernels.native import NativeSide
from synapse.vectors.codes import (
    Bytes,
    Float32s,
    Frame,
    Metric,
    allocate,
    encode,
    fits,
    grow,
    learn_frame,
    lengths,
)
from synapse.vectors.file import check_view, read_view, write_view
from synapse.vectors.kernel import bind, examples, find
from synapse.vectors.scan import Answer, Int64s, Scan, View, agrees, scan_reference

MOST_DIMENSIONS = 4096
LARGEST = 1e15
"""The largest component by absolute value; products of larger ones would not fit in float32."""
SMALLEST_CAPACITY = 64


class PatternIndex:
    """Vectors with integer ids, and exact search among them.

    Scores are larger for what is nearer, with every metric: ``dot`` is q·x, ``cosine`` is q·x / (|q| |x|) and 0 when
    either is zero, ``l2`` is the negated squared distance. Equal scores are ordered by id, smaller first.

    Searches never wait: a search sees the index as it was when it began, also while another thread adds, removes or
    saves. Changes are made one at a time, and each is there as a whole or not at all.
    """

    def __init__(self, dim: int, metric: Metric = "cosine", *, scan: Scan | None = None) -> None:
        """An empty index.

        Args:
            dim: components of a vector, 1 to 4096.
            scan: what finds the nearest; by default the hot path `pattern_search`, kernel or reference.

        Raises:
            InvalidInput: there is no such metric, or the dimension is out of range.
        """
        if metric not in get_args(Metric):
            raise InvalidInput(
                f"the metric is one of {', '.join(get_args(Metric))}, not {metric!r}",
                hint='use "cosine" unless the length of a vector means something',
            )
        if isinstance(dim, bool) or not isinstance(dim, int) or not 1 <= dim <= MOST_DIMENSIONS:
            raise InvalidInput(f"the dimension is an integer from 1 to {MOST_DIMENSIONS}, not {dim!r}")
        self.dim = dim
        self.metric: Metric = metric
        self._scan = scan or default_scan
        self._lock = threading.Lock()
        self._view: View | None = _empty(dim, metric)
        self._row_of: dict[int, int] | None = {}

    def __len__(self) -> int:
        """How many vectors there are."""
        return self._current().live

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays, spare room included."""
        view = self._current()
        return view.ids.nbytes + view.vectors.nbytes + view.norms.nbytes + view.codes.nbytes

    def add(self, ids: ArrayLike, vectors: ArrayLike) -> None:
        """Add vectors [n, dim]; an id that is there already gets the new vector.

        Raises:
            InvalidInput: an id is no integer or given twice, the shapes do not fit, the vectors are not floats, or a
                component is not finite or larger than 1e15. Nothing was added.
            Conflict: the index is closed.
        """
        new_ids = _checked_ids(ids)
        new = self._checked_vectors(vectors, "vectors")
        if len(new_ids) != len(new):
            raise InvalidInput(f"there are {len(new_ids)} ids for {len(new)} vectors", hint="give one id per vector")
        if len(np.unique(new_ids)) != len(new_ids):
            raise InvalidInput("an id is given twice in one call", hint="keep one vector per id")
        if not len(new):
            return
        with self._lock:
            view = self._current()
            rows = self._rows()
            replaced = [rows[i] for i in new_ids.tolist() if i in rows]
            mask = _without(view, replaced) if replaced else view.mask
            view = self._with(view, mask, view.live - len(replaced), new_ids, new)
            for row, identity in enumerate(new_ids.tolist(), view.count - len(new)):
                rows[identity] = row
            self._publish(view)

    def remove(self, ids: ArrayLike) -> None:
        """Remove vectors by id.

        Raises:
            NotFound: an id is not there; nothing was removed.
            InvalidInput: an id is no integer, or given twice.
            Conflict: the index is closed.
        """
        gone = _checked_ids(ids)
        if len(np.unique(gone)) != len(gone):
            raise InvalidInput("an id is given twice in one call", hint="name each id once")
        with self._lock:
            view = self._current()
            rows = self._rows()
            missing = [i for i in gone.tolist() if i not in rows]
            if missing:
                raise NotFound(f"{len(missing)} of the ids are not in the index, {missing[0]} is the first of them")
            if len(gone):
                mask = _without(view, [rows.pop(i) for i in gone.tolist()])
                self._publish(replace(view, mask=mask, live=view.live - len(gone)))

    def search(self, queries: ArrayLike, k: int, allow: Iterable[int] | None = None) -> Answer:
        """The k nearest vectors of each query, best first.

        Args:
            queries: [dim] or [n, dim].
            allow: ids to search among; those that are not in the index are passed over. None means all.

        Returns:
            ids (int64) and scores (float32), both [n, m], or [m] for a query [dim], with m the smaller of k and the
            number of vectors to choose from.

        Raises:
            InvalidInput: k is no positive integer, or the queries do not fit (as in `add`).
            Conflict: the index is closed.
            IndexDamaged: its file was cut short while it was open.
        """
        if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
            raise InvalidInput(f"k is a positive integer, not {k!r}")
        single = np.ndim(queries) == 1
        checked = self._checked_vectors(np.asarray(queries)[None] if single else queries, "queries")
        view = self._current()
        mask, among = view.mask, view.live
        if allow is not None:
            mask = _allowed(view, allow)
            among = int(np.count_nonzero(mask))
        answer = self._scan(view, checked, min(int(k), among), mask)
        check_view(view)
        return (answer[0][0], answer[1][0]) if single else answer

    def save(self, path: Path) -> None:
        """Write the index to a file, which is complete or not there at all.

        Raises:
            Unavailable: the file cannot be written.
            Conflict: the index is closed.
        """
        with self._lock:
            view = self._current()
            write_view(path, view if view.mask is None else _compacted(view))

    @classmethod
    def load(cls, path: Path, *, scan: Scan | None = None) -> Self:
        """Open a saved index. Its arrays stay in the file (memory-mapped) until the first change.

        Raises:
            NotFound: there is no such file.
            Corrupt: it is not an index, of another version, cut short or altered.
        """
        view = read_view(path)
        index = cls(view.vectors.shape[1], view.metric, scan=scan)
        index._view, index._row_of = view, None
        return index

    def close(self) -> None:
        """Let go of the memory and the file; every later use raises `Conflict`. Searches that are running end well."""
        with self._lock:
            self._view = None
            self._row_of = {}

    def _current(self) -> View:
        view = self._view
        if view is None:
            raise Conflict("the index is closed", hint="open it again with PatternIndex.load")
        return view

    def _rows(self) -> dict[int, int]:
        """The row of each id. Held lock needed."""
        if self._row_of is None:
            view = self._current()
            ids = view.ids[: view.count]
            self._row_of = {identity: row for row, identity in enumerate(ids.tolist())}
        return self._row_of

    def _publish(self, view: View) -> None:
        """Make a view the current one, after clearing out removed rows when they are the larger part."""
        if view.count > 2 * view.live + SMALLEST_CAPACITY:
            view = _compacted(view)
            self._row_of = None
        self._view = view

    def _with(self, view: View, mask: Bytes | None, live: int, ids: Int64s, vectors: Float32s) -> View:
        """The view with more rows. They are written behind `view.count`, where no search of an older view looks."""
        first, count = view.count, view.count + len(ids)
        if count > len(view.ids) or not view.ids.flags.writeable:
            view = _grown(view, max(count, 2 * first, SMALLEST_CAPACITY))
        view.ids[first:count] = ids
        view.vectors[first:count] = vectors
        view.norms[first:count] = lengths(vectors.astype(np.float64))
        if count > 2 * view.frame.rows or not fits(view.frame, vectors, self.metric):
            frame, codes = learn_frame(view.vectors[:count], self.metric), allocate(len(view.ids), self.dim)
            encode(codes, 0, view.vectors[:count], frame, self.metric)
            view = replace(view, frame=frame, codes=codes)
        else:
            encode(view.codes, first, vectors, view.frame, self.metric)
        if mask is not None:
            mask = np.concatenate([mask, np.ones(len(ids), np.uint8)])
        return replace(view, count=count, live=live + len(ids), mask=mask)

    def _checked_vectors(self, values: ArrayLike, what: str) -> Float32s:
        array = np.asarray(values)
        if array.dtype.kind != "f":
            raise InvalidInput(f"{what} are arrays of floats, not of {array.dtype}", hint="convert them to float32")
        if array.ndim != 2 or array.shape[1] != self.dim:
            raise InvalidInput(f"{what} have the shape [n, {self.dim}], not {list(array.shape)}")
        with np.errstate(over="ignore"):
            vectors = np.ascontiguousarray(array, np.float32)
        if vectors.size and not np.abs(vectors).max() <= LARGEST:  # a NaN makes this comparison false
            raise InvalidInput(f"a component of the {what} is not finite, or larger than {LARGEST:g}")
        return vectors


default_scan = hotpath("pattern_search", kernel=NativeSide(find, bind), agrees=agrees, burn_in=examples)(scan_reference)
"""The hot path: the kernel or the reference, as its rollout says. Both give the same answer."""


def _checked_ids(ids: ArrayLike) -> Int64s:
    array = np.asarray(ids)
    if array.size == 0 and array.ndim == 1:
        return np.empty(0, np.int64)
    if array.dtype.kind not in "iu" or array.ndim != 1:
        raise InvalidInput(f"ids are a list of integers, not an array of {array.dtype} with shape {list(array.shape)}")
    if array.dtype.kind == "u" and array.max() > np.iinfo(np.int64).max:
        raise InvalidInput(f"an id is larger than a 64-bit integer: {array.max()}")
    return array.astype(np.int64)


def _allowed(view: View, allow: Iterable[int]) -> Bytes:
    listed = _checked_ids(allow if isinstance(allow, np.ndarray) else list(allow))
    wanted = np.isin(view.ids[: view.count], listed)
    if view.mask is not None:
        wanted &= view.mask != 0
    return wanted.astype(np.uint8)


def _empty(dim: int, metric: Metric) -> View:
    frame = Frame(np.zeros(dim), 1.0, 0)
    return _grown(
        View(
            metric,
            0,
            0,
            np.empty(0, np.int64),
            np.empty((0, dim), np.float32),
            np.empty(0),
            allocate(0, dim),
            frame,
            None,
        ),
        SMALLEST_CAPACITY,
    )


def _grown(view: View, capacity: int) -> View:
    """A copy with room for so many rows."""
    dim, count = view.vectors.shape[1], view.count
    ids, vectors, norms = np.empty(capacity, np.int64), np.empty((capacity, dim), np.float32), np.empty(capacity)
    ids[:count], vectors[:count], norms[:count] = view.ids[:count], view.vectors[:count], view.norms[:count]
    return replace(view, ids=ids, vectors=vectors, norms=norms, codes=grow(view.codes, capacity, dim))


def _compacted(view: View) -> View:
    """The view without its removed rows and spare room; codes are made anew."""
    kept = np.arange(view.count) if view.mask is None else np.flatnonzero(view.mask)
    vectors = view.vectors[kept]
    frame, codes = learn_frame(vectors, view.metric), allocate(len(kept), vectors.shape[1])
    encode(codes, 0, vectors, frame, view.metric)
    return View(view.metric, len(kept), len(kept), view.ids[kept], vectors, view.norms[kept], codes, frame, None)


def _without(view: View, rows: list[int]) -> Bytes:
    mask = np.ones(view.count, np.uint8) if view.mask is None else view.mask.copy()
    mask[rows] = 0
    return mask
