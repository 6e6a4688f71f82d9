"""Rounding weights to eight and four bits, a block of 32 inputs at a time, with the least squared error that is found.

A block is a column here: [32, blocks] is what NumPy is quick with.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from synapse.models.errors import ModelFileCorrupt

Array = NDArray[np.float32]

BLOCK = 32
"""Inputs that share a scale."""
_Q8_STEPS = (127.0, 126.0, 125.0, 124.0)
"""Steps that the largest weight of a block is tried at."""
_Q4_STEPS = (14.0, 14.4, 14.8, 15.2, 15.6, 16.0)
"""Steps that the range of a block is tried at, before the best line through its codes is taken."""
_LARGEST_Q8 = 65504.0 * _Q8_STEPS[-1]
_LARGEST_Q4 = 65504.0 / 2  # the line through the codes may begin below the least weight
HINT = "the file is damaged, or was not made by a sound converter: download or convert it again"


def round_q8(values: Array) -> tuple[Array, NDArray[np.int8]]:
    """A matrix, float32[out, in], as scales, [out, blocks], and codes of -127 to 127, [out, 32 x blocks].

    Of a few scales for a block, the one with the least squared error is taken. No weight is wrong by more than half a
    scale, and no scale is more than 1/124 of its block's largest weight (rounded up to float16).

    Raises:
        ModelFileCorrupt: a weight is not finite, or too large for a float16 scale.
    """
    x = _blocks(values, _LARGEST_Q8)
    peak = np.abs(x).max(axis=0)
    best, least = np.zeros_like(peak), np.full_like(peak, np.inf)
    for steps in _Q8_STEPS:
        d = _round_up(peak / np.float32(steps))
        codes = _codes_q8(x, d)
        codes *= d
        error = _error(codes, x)
        best, least = np.where(error < least, d, best), np.minimum(error, least)
    rows = len(values)
    return best.reshape(rows, -1), _codes_q8(x, best).T.astype(np.int8).reshape(rows, -1)


def round_q4(values: Array) -> tuple[Array, Array, NDArray[np.uint8]]:
    """A matrix, float32[out, in], as scales and offsets, [out, blocks], and codes of 0 to 15, [out, 32 x blocks].

    First the codes run from the least to the greatest weight. Then, for several scales, the line through the codes
    that fits the weights best (as llama.cpp's make_qkx2_quants does) gives new scales, offsets and codes. What has the
    least squared error is taken.

    Raises:
        ModelFileCorrupt: a weight is not finite, or too large for float16.
    """
    x = _blocks(values, _LARGEST_Q4)
    low, high, total = x.min(axis=0), x.max(axis=0), x.sum(axis=0)
    m = -_round_up(-low)
    d = _round_up((high - m) / np.float32(15))
    best_d, best_m, least = d, m, _error(_line(_codes_q4(x, d, m), d, m), x)
    for steps in _Q4_STEPS:
        codes = _codes_q4(x, (high - low) / np.float32(steps), low)
        sum_c, sum_cc, sum_cx = codes.sum(axis=0), _dot(codes, codes), _dot(codes, x)
        d = _half(np.maximum(BLOCK * sum_cx - sum_c * total, 0) * _inverse(BLOCK * sum_cc - sum_c * sum_c))
        m = _half((total - d * sum_c) / np.float32(BLOCK))
        error = _error(_line(_codes_q4(x, d, m), d, m), x)
        better = error < least
        best_d, best_m, least = np.where(better, d, best_d), np.where(better, m, best_m), np.minimum(error, least)
    rows, codes = len(values), _codes_q4(x, best_d, best_m)
    return best_d.reshape(rows, -1), best_m.reshape(rows, -1), codes.T.astype(np.uint8).reshape(rows, -1)


def _blocks(values: Array, largest: float) -> Array:
    """[out, in] -> [32, out x blocks]; the last weight of a row is repeated, so that the padding takes no range."""
    if not np.abs(values).max(initial=0) <= largest:  # so written, NaN is caught too
        raise ModelFileCorrupt(f"has weights that are not finite or beyond ±{largest:g}; none may be", hint=HINT)
    missing = -values.shape[1] % BLOCK
    if missing:
        values = np.pad(values, ((0, 0), (0, missing)), mode="edge")
    return np.ascontiguousarray(values.reshape(-1, BLOCK).T)


def _half(values: Array) -> Array:
    """Rounded to float16."""
    with np.errstate(over="ignore"):
        half: Array = values.astype(np.float16).astype(np.float32)
    return half


def _round_up(values: Array) -> Array:
    """The least float16 that is not below."""
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
        low = half.astype(np.float32) < values
        return np.where(low, np.nextafter(half, np.float16(np.inf)), half).astype(np.float32)


def _inverse(values: Array) -> Array:
    """1 / value, and 0 where value is 0 or too small for that."""
    return np.divide(np.float32(1), values, out=np.zeros_like(values), where=values > 1e-37)


def _codes_q8(x: Array, d: Array) -> Array:
    codes: Array = x * _inverse(d)
    np.rint(codes, out=codes)
    return codes


def _codes_q4(x: Array, d: Array, m: Array) -> Array:
    codes = x - m
    codes *= _inverse(d)
    return np.clip(np.rint(codes, out=codes), 0, 15, out=codes)


def _line(codes: Array, d: Array, m: Array) -> Array:
    """What the codes stand for, in their place."""
    codes *= d
    codes += m
    return codes


def _dot(a: Array, b: Array) -> Array:
    """The dot product of each block with the other."""
    products: Array = (a * b).sum(axis=0)
    return products


def _error(found: Array, x: Array) -> Array:
    """The squared error of each block; `found` is used up."""
    found -= x
    found *= found
    errors: Array = found.sum(axis=0)
    return errors
