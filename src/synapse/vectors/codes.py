"""The compact codes of a pattern index: eight bits a dimension in two planes of four, each with a proven error bound.

A vector v (for cosine: divided by its length) is moved and scaled into the index' frame, ``y = (v - centre) / unit``.
Each component of y is rounded to one of 256 evenly spaced levels between the vector's own least and greatest one::

    y ≈ ŷ₈ = lowest + scale · c           c in 0..255           (all eight bits)
    y ≈ ŷ₄ = middle + scale · 16 · (c>>4)  middle = lowest + 7.5 · scale   (the high four bits)

What a search needs to know about the rounding is kept with the codes: the lengths of y - ŷ₈ and of y - ŷ₄. By the
Cauchy-Schwarz inequality a score computed from codes is wrong by at most that length times the length of the query, for
every query. The high halves of sixteen rows lie interleaved, so that one machine instruction multiplies the codes of
sixteen rows; the low halves lie row by row, because only few rows need them.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Metric = Literal["cosine", "dot", "l2"]

Float32s = NDArray[np.float32]
Float64s = NDArray[np.float64]
Bytes = NDArray[np.uint8]

GROUP = 16
"""Rows whose high halves lie interleaved."""
FLOAT32_SLACK = 2.0**-18
"""At least four times the relative rounding error of a score computed in float32 from codes and their parameters."""
SCORE_SLACK = 2.0**-22
"""At least twice the relative rounding error of a final score, so that rows which tie after rounding are not missed."""
SCORE_UNDERFLOW = 2.0**-148
"""At least twice the absolute error of a final score too small for float32, likewise."""
LARGEST_UNIT = 2.0**20
"""A vector longer than this many units does not fit the frame."""
_CHUNK = 2048


@dataclass(frozen=True, slots=True)
class Frame:
    """The origin and the unit of length of an index' codes, learnt from the `rows` vectors it had at the time."""

    centre: Float64s
    unit: float
    rows: int


@dataclass(frozen=True, slots=True)
class Codes:
    """The codes of up to `capacity` rows; row arrays have one entry a row, rounded up to whole groups."""

    high: Bytes
    """[groups, dimensions / 8, 16, 4]: the high halves; byte b of line l holds the dimensions 8l + b and 8l + 4 + b."""
    low: Bytes
    """[rows, dimensions / 2]: the low halves, in the same order within a row."""
    middle: Float32s
    scale: Float32s
    coarse_error: Float32s
    """An upper bound of the length of y - ŷ₄, rounding errors of the score included."""
    fine_error: Float32s
    """An upper bound of the length of y - ŷ₈, likewise."""
    size: Float32s
    """An upper bound of the lengths of ŷ₄ and ŷ₈: what an error in the query's own codes is multiplied with."""
    bias: Float32s
    """What is added to a score beside the product: -|y|²/2 for l2, else 0."""

    @property
    def capacity(self) -> int:
        return len(self.low)

    @property
    def nbytes(self) -> int:
        return sum(getattr(self, field.name).nbytes for field in fields(self))


def allocate(capacity: int, dimensions: int) -> Codes:
    """Codes for `capacity` rows, rounded up to whole groups, all zero."""
    groups = -(-capacity // GROUP)
    lines = -(-dimensions // 8)
    rows = groups * GROUP
    codes = Codes(
        np.empty((groups, lines, GROUP, 4), np.uint8),
        np.empty((rows, lines * 4), np.uint8),
        *(np.empty(rows, np.float32) for _ in range(6)),
    )
    for field in fields(codes):  # NumPy asks for huge pages in np.empty, but not in np.zeros
        getattr(codes, field.name).fill(0)
    return codes


def grow(codes: Codes, capacity: int, dimensions: int) -> Codes:
    """A copy with more room."""
    larger = allocate(capacity, dimensions)
    for field in fields(codes):
        old = getattr(codes, field.name)
        getattr(larger, field.name)[: len(old)] = old
    return larger


def scored(vectors: Float32s, metric: Metric) -> Float64s:
    """The vectors whose products with a query are compared: for cosine those of length one (zero stays zero)."""
    exact = vectors.astype(np.float64)
    if metric == "cosine":
        norms = lengths(exact)
        exact /= np.where(norms > 0, norms, 1.0)[:, None]
    return exact


def learn_frame(vectors: Float32s, metric: Metric) -> Frame:
    """The frame for these vectors: their mean, and a power of two that no distance from it exceeds."""
    total = np.zeros(vectors.shape[1])
    for start in range(0, len(vectors), _CHUNK):
        total += scored(vectors[start : start + _CHUNK], metric).sum(axis=0)
    centre = total / max(1, len(vectors))
    longest = 0.0
    for start in range(0, len(vectors), _CHUNK):
        y = scored(vectors[start : start + _CHUNK], metric) - centre
        longest = max(longest, float((y * y).sum(axis=1).max()))
    unit = float(2.0 ** np.ceil(np.log2(np.sqrt(longest)))) if longest > 0 else 1.0
    return Frame(centre, unit, len(vectors))


def fits(frame: Frame, vectors: Float32s, metric: Metric) -> bool:
    """Whether these vectors can be coded in the frame (they are finite, so this only asks about their length)."""
    return all(
        np.abs(scored(vectors[start : start + _CHUNK], metric) - frame.centre).max() < LARGEST_UNIT * frame.unit
        for start in range(0, len(vectors), _CHUNK)
    )


def encode(codes: Codes, first: int, vectors: Float32s, frame: Frame, metric: Metric) -> None:
    """Write the codes of `vectors` into the rows from `first` on."""
    for start in range(0, len(vectors), _CHUNK):
        chunk = vectors[start : start + _CHUNK]
        _encode_chunk(codes, np.arange(first + start, first + start + len(chunk)), chunk, frame, metric)


def _encode_chunk(codes: Codes, rows: NDArray[np.intp], vectors: Float32s, frame: Frame, metric: Metric) -> None:
    v = scored(vectors, metric)
    y = (v - frame.centre) / frame.unit
    least, greatest = y.min(axis=1), y.max(axis=1)
    scale = np.maximum((greatest - least) / 255, 1e-30).astype(np.float32)
    middle = (least + 7.5 * scale).astype(np.float32)
    step, centre = scale.astype(np.float64)[:, None], middle.astype(np.float64)[:, None]
    lowest = centre - 7.5 * step
    levels = np.rint((y - lowest) / step).clip(0, 255).astype(np.uint8)
    coarse, fine = centre + step * (levels & 0xF0), lowest + step * levels

    dimensions = y.shape[1]
    magnitude = (np.abs(lowest) + 255 * step)[:, 0] * np.sqrt(
        dimensions
    )  # no term of a score is larger, per unit of query
    slack = FLOAT32_SLACK * magnitude + SCORE_SLACK / frame.unit * lengths(v)
    codes.middle[rows], codes.scale[rows] = middle, scale
    codes.coarse_error[rows] = round_up(lengths(y - coarse) + slack)
    codes.fine_error[rows] = round_up(lengths(y - fine) + slack)
    codes.size[rows] = round_up(np.maximum(lengths(coarse), lengths(fine)))
    codes.bias[rows] = -0.5 * (y * y).sum(axis=1) if metric == "l2" else 0.0

    padded = np.zeros((len(rows), codes.low.shape[1] * 2), np.uint8)
    padded[:, :dimensions] = levels
    halves = padded.reshape(len(rows), -1, 2, 4)
    first, second = halves[:, :, 0], halves[:, :, 1]
    codes.high.transpose(0, 2, 1, 3)[rows // GROUP, rows % GROUP] = first >> 4 | second & 0xF0
    codes.low[rows] = (first & 0x0F | second << 4).reshape(len(rows), -1)


def round_up(values: Float64s) -> Float32s:
    """The values in float32, each of them larger than it was."""
    return np.nextafter(values.astype(np.float32), np.float32(np.inf))


def lengths(vectors: Float64s) -> Float64s:
    """The Euclidean length of each row."""
    squares: Float64s = np.einsum("ij,ij->i", vectors, vectors)
    return np.sqrt(squares)
