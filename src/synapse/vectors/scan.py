"""Who the k nearest vectors are: what is meant, the NumPy reference, and the native scan that must agree with it.

**The score** of a query q and a vector x is the float32 nearest to this, computed in float64 from float32 components:

- ``dot``: q·x
- ``cosine``: q·x / (|q| |x|), and 0 when either is zero
- ``l2``: -|q - x|², the negated squared distance, so that a larger score is always better

The k nearest are those with the largest scores; among equal scores the smaller id comes first.

**How both scans find them.** Computing every score in float64 is slow, so a first pass finds the *candidates*: an
approximate score for every row, with a proven bound of its error. The k-th largest lower bound is a score that k rows
surely reach, and a row whose upper bound is below it cannot be among the nearest. The candidates' scores are then
computed as defined above, by one function for both scans, so their answers are the same to the last bit.

The reference's first pass is a float32 matrix product of the vectors themselves; the native one reads the codes of
`codes.py`, an eighth of the bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from synapse.errors import InternalError
from synapse.kernels.mapped_file import MappedFile
from synapse.vectors.codes import SCORE_SLACK, SCORE_UNDERFLOW, Bytes, Codes, Float32s, Float64s, Frame, Metric

Int64s = NDArray[np.int64]
Rows = NDArray[np.intp]
Answer = tuple[Int64s, Float32s]
"""Ids and scores, both [queries, k], best first."""


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class View:
    """An index as it was at one moment. Nothing in the first `count` rows of its arrays ever changes."""

    metric: Metric
    count: int
    live: int
    ids: Int64s
    vectors: Float32s
    norms: Float64s
    codes: Codes
    frame: Frame
    mask: Bytes | None
    """[count]: 1 for rows that are there, 0 for removed ones; None when all are there."""
    file: MappedFile | None = None
    """What the arrays lie in, where they are not in memory."""


Scan = Callable[[View, Float32s, int, "Bytes | None"], Answer]
"""(view, queries [n, dimensions], k, mask) to the k nearest of the rows that the mask has 1 for (at least k)."""


def agrees(one: Answer, other: Answer) -> bool:
    """Whether two scans gave the same answer: the same ids in the same order, the same scores to the last bit."""
    return np.array_equal(one[0], other[0]) and np.array_equal(one[1], other[1])


def scan_reference(view: View, queries: Float32s, k: int, mask: Bytes | None) -> Answer:
    """The specification: float32 matrix products, their error bound, and exact scores of what is left.

    A float32 dot product of length d, summed in any order, is wrong by at most d·u/(1 - d·u)·|q||x| with u = 2⁻²⁴
    (Higham, Accuracy and Stability of Numerical Algorithms, 3.1), plus d times the least normal number for underflow.
    """
    dimensions = view.vectors.shape[1]
    relative, absolute = 1.01 * dimensions * 2.0**-24 + SCORE_SLACK, 2 * dimensions * 2.0**-126
    vectors, norms = view.vectors[: view.count], view.norms[: view.count]
    candidates: list[Rows] = []
    for query in queries:
        norm = np.linalg.norm(query.astype(np.float64))
        products = (vectors @ query).astype(np.float64)
        error = relative * norm * norms + absolute
        if view.metric == "cosine":
            divisors = np.where(norms > 0, norms, 1.0)
            products, error = products / divisors, error / divisors + SCORE_UNDERFLOW * norm
        elif view.metric == "l2":
            squares = norms * norms
            products, error = 2 * products - squares, 2 * error + SCORE_SLACK * (squares + norm * norm)
        if mask is not None:
            products[mask == 0] = -np.inf
        threshold = np.partition(products - error, len(products) - k)[len(products) - k] if k else np.inf
        candidates.append(np.flatnonzero(products + error >= threshold))
    return nearest(view, queries, candidates, k)


def nearest(view: View, queries: Float32s, candidates: list[Rows], k: int) -> Answer:
    """The k best of each query's candidate rows, which must hold them, by exact score and then by id.

    Raises:
        InternalError: there are fewer candidates than k.
    """
    ids, scores = np.empty((len(queries), k), np.int64), np.empty((len(queries), k), np.float32)
    for i, (query, rows) in enumerate(zip(queries, candidates, strict=True)):
        if len(rows) < k:
            raise InternalError(f"a scan found {len(rows)} candidates for the {k} nearest")
        exact = exact_scores(view.metric, query, view.vectors, rows)
        order = np.lexsort((view.ids[rows], -exact))[:k]
        ids[i], scores[i] = view.ids[rows[order]], exact[order]
    return ids, scores


def exact_scores(metric: Metric, query: Float32s, vectors: Float32s, rows: Rows) -> Float32s:
    """The scores, by definition, of some rows. A row's score depends on nothing but the row and the query."""
    scores = np.zeros(len(rows), np.float32)
    if metric != "l2" and not query.any():
        return scores
    q = query.astype(np.float64)
    for start in range(0, len(rows), 4096):
        x = vectors[rows[start : start + 4096]].astype(np.float64)
        if metric == "l2":
            difference = q - x
            exact = -np.add.reduce(difference * difference, axis=1)
        else:
            exact = np.add.reduce(x * q, axis=1)
        if metric == "cosine":
            length = np.sqrt(np.add.reduce(x * x, axis=1)) * np.sqrt(np.add.reduce(q * q))
            exact = np.divide(exact, length, out=np.zeros_like(exact), where=length > 0)
        scores[start : start + 4096] = exact
    return scores + np.float32(0)  # -0 becomes 0
