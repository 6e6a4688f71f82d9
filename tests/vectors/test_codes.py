"""The bounds that make a search exact, checked against what they bound."""

from __future__ import annotations

import ctypes
from functools import partial
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from support.pattern_kernel import native_scan
from synapse.vectors.codes import Codes, Frame, allocate, encode, fits, grow, learn_frame, lengths, round_up
from synapse.vectors.kernel import TERMS, PrepareCall, address


def vectors_of(seed: int, rows: int, dim: int, exponent: float) -> NDArray[np.float32]:
    random = np.random.default_rng(seed)
    return (random.standard_normal((rows, dim)) * 10.0**exponent + random.normal()).astype(np.float32)


def unpacked(codes: Codes, rows: int, dim: int) -> NDArray[np.uint8]:
    """The eight-bit codes [rows, dim], put together from the two planes."""
    high = codes.high.transpose(0, 2, 1, 3).reshape(-1, codes.high.shape[1], 4)[:rows]
    low = codes.low[:rows].reshape(rows, -1, 4)
    first, second = (high & 15) << 4 | low & 15, high & 0xF0 | low >> 4
    return np.stack([first, second], axis=2).reshape(rows, -1)[:, :dim]


def decoded(codes: Codes, rows: int, dim: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """ŷ of all eight bits, and of the high four."""
    c = unpacked(codes, rows, dim).astype(np.float64)
    scale, middle = (array[:rows, None].astype(np.float64) for array in (codes.scale, codes.middle))
    return middle - 7.5 * scale + scale * c, middle + scale * 16 * np.floor(c / 16)


cases = given(
    seed=st.integers(0, 10**6),
    rows=st.integers(1, 70),
    dim=st.integers(1, 130),
    exponent=st.floats(-20, 12),
    metric=st.sampled_from(["cosine", "dot", "l2"]),
)


@cases
@settings(deadline=None)
def test_no_vector_is_farther_from_its_codes_than_they_say(
    seed: int, rows: int, dim: int, exponent: float, metric: Any
) -> None:
    vectors = vectors_of(seed, rows, dim, exponent)
    frame, codes = learn_frame(vectors, metric), allocate(rows, dim)
    encode(codes, 0, vectors, frame, metric)
    v = vectors.astype(np.float64)
    if metric == "cosine":
        v /= np.maximum(lengths(v), 1e-300)[:, None]
    y = (v - frame.centre) / frame.unit
    fine, coarse = decoded(codes, rows, dim)
    assert (lengths(y - fine) <= codes.fine_error[:rows]).all()
    assert (lengths(y - coarse) <= codes.coarse_error[:rows]).all()
    assert (np.maximum(lengths(fine), lengths(coarse)) <= codes.size[:rows]).all()
    assert lengths(y).max() <= 1 + 1e-9


@cases
@example(seed=75279, rows=1, dim=86, exponent=-17.0, metric="l2")  # codes so near that float64 rounds what is left
@settings(deadline=None)
def test_no_query_is_farther_from_its_codes_than_its_terms_say(
    seed: int, rows: int, dim: int, exponent: float, metric: Any
) -> None:
    vectors = vectors_of(seed, 20, dim, exponent)
    queries = vectors_of(seed + 1, rows, dim, exponent / 2)
    frame, codes = learn_frame(vectors, metric), allocate(20, dim)
    packed, terms = np.zeros((rows, 2, codes.low.shape[1]), np.int8), np.empty(rows, TERMS)
    numbers = (rows, dim, codes.high.shape[1], metric == "l2", metric == "dot", frame.unit)
    call = PrepareCall(*numbers, *(address(array) for array in (queries, frame.centre, packed, terms)))
    library: ctypes.CDLL = cast("partial[Any]", native_scan()).args[0]
    library.pattern_search_prepare(ctypes.byref(call))
    levels = packed.reshape(rows, 2, -1, 4).transpose(0, 2, 1, 3).reshape(rows, -1)
    assert not levels[:, dim:].any()
    q = queries.astype(np.float64)
    if metric == "l2":
        w = (q - frame.centre) / frame.unit * np.minimum(1, 1 / lengths((q - frame.centre) / frame.unit))[:, None]
    else:
        w = q / lengths(q)[:, None]
    own = terms["step"].astype(np.float64)[:, None] * levels[:, :dim]
    assert (lengths(w) <= terms["norm"]).all()
    assert (lengths(w - own) <= terms["error"]).all()
    assert (terms["error"] <= 0.02 * np.sqrt(dim) + 1e-6).all()
    np.testing.assert_allclose(terms["total"], own.sum(axis=1), rtol=1e-6, atol=1e-12)


def test_rounding_up_never_makes_smaller() -> None:
    values = np.concatenate([10.0 ** np.random.default_rng(0).uniform(-44, 38, 10_000), [0.0, 1.0, 2.0**-149]])
    assert (round_up(values).astype(np.float64) > values).all()


def test_rows_can_be_coded_one_after_another() -> None:
    vectors = vectors_of(0, 50, 20, 0)
    frame = learn_frame(vectors, "dot")
    together, piecewise = allocate(50, 20), allocate(10, 20)
    encode(together, 0, vectors, frame, "dot")
    piecewise = grow(piecewise, 50, 20)
    for start, end in ((0, 1), (1, 17), (17, 50)):
        encode(piecewise, start, vectors[start:end], frame, "dot")
    for name in ("high", "low", "middle", "scale", "coarse_error", "fine_error", "size", "bias"):
        np.testing.assert_array_equal(getattr(together, name), getattr(piecewise, name))


def test_eight_bits_are_sixteen_times_as_exact_as_four() -> None:
    vectors = vectors_of(0, 100, 384, 0)
    codes = allocate(100, 384)
    encode(codes, 0, vectors, learn_frame(vectors, "cosine"), "cosine")
    ratio = codes.coarse_error[:100] / codes.fine_error[:100]
    assert ratio.mean() == pytest.approx(16, rel=0.05)


def test_vectors_too_far_from_the_frame_are_noticed() -> None:
    near = vectors_of(0, 100, 8, 0)
    frame = learn_frame(near, "l2")
    assert fits(frame, near * np.float32(1000), "l2")
    assert not fits(frame, near * np.float32(1e8), "l2")
    assert fits(frame, near * np.float32(1e8), "cosine")


def test_a_frame_of_equal_vectors_has_a_unit() -> None:
    frame = learn_frame(np.zeros((5, 3), np.float32), "dot")
    assert isinstance(frame, Frame)
    assert frame.unit == 1.0
