"""Packed matrices: the layout to the byte, blocks of GGUF kept as they are, and rounding with known bounds."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as Q
from gguf.quants import dequantize, quantize
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from synapse.engines.native.packed.packing import (
    Kind,
    as_records,
    pack_matrix,
    pack_q4,
    pack_q4_0,
    pack_q8,
    pack_rows,
    packed_bytes,
    quantise_q4,
    quantise_q4_0,
    quantise_q8,
    unpack,
    unpack_rows,
)
from synapse.models.errors import ModelFileCorrupt
from synapse.models.gguf_file import TENSOR_TYPES

Array = NDArray[np.float32]
LOSSLESS: list[tuple[str, Kind]] = [("Q4_0", "q4"), ("Q4_0", "q4_0"), ("Q4_1", "q4"), ("Q8_0", "q8")]
shapes = st.tuples(st.integers(1, 70), st.integers(1, 130))


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def any_q4(out: int, blocks: int, seed: int) -> tuple[NDArray[np.float16], NDArray[np.float16], NDArray[np.uint8]]:
    random = np.random.default_rng(seed)
    d, m = random.standard_normal((2, out, blocks)).astype(np.float16)
    return d, m, random.integers(0, 16, (out, 32 * blocks), dtype=np.uint8)


def any_q8(out: int, blocks: int, seed: int) -> tuple[NDArray[np.float16], NDArray[np.int8]]:
    random = np.random.default_rng(seed)
    d = random.standard_normal((out, blocks)).astype(np.float16)
    return d, random.integers(-127, 128, (out, 32 * blocks), dtype=np.int8)


def weight_of_q4(data: bytes, blocks: int, output: int, number: int) -> float:
    """One weight, read byte by byte from the description of the format."""
    record = data[(output // 16 * blocks + number // 32) * 320 :][:320]
    o, within = output % 16, number % 32
    d, m = (struct.unpack_from("<e", record, at + 2 * o)[0] for at in (0, 32))
    byte = record[64 + within // 8 * 64 + o * 4 + within % 4]
    return float(np.float32(d) * np.float32(byte >> 4 if within % 8 >= 4 else byte & 15) + np.float32(m))


def weight_of_q8(data: bytes, blocks: int, output: int, number: int) -> float:
    record = data[(output // 16 * blocks + number // 32) * 544 :][:544]
    o, within = output % 16, number % 32
    (d,) = struct.unpack_from("<e", record, 2 * o)
    (code,) = struct.unpack_from("<b", record, 32 + within // 2 * 32 + o * 2 + within % 2)
    return float(np.float32(d) * np.float32(code))


def scales(kind: Kind, records: NDArray[Any], rows: int) -> Array:
    """The scale of each block, float32[out, blocks]."""
    d: Array = as_records(kind, records, (rows, 32 * records.shape[1]))["d"].astype(np.float32)
    return d.transpose(0, 2, 1).reshape(-1, records.shape[1])[:rows]


def packed_both_ways(values: Array) -> list[tuple[Kind, NDArray[Any]]]:
    return [("q4", quantise_q4(values)), ("q4_0", quantise_q4_0(values)), ("q8", quantise_q8(values))]


def by_block(values: Array) -> Array:
    """[out, in] -> [out, blocks, 32], padded with zeros."""
    rows, columns = values.shape
    return np.pad(values, ((0, 0), (0, -columns % 32))).reshape(rows, -1, 32)


@given(out=st.integers(1, 40), blocks=st.integers(1, 3), seed=st.integers(0, 9))
def test_every_byte_of_q4_is_where_the_format_says(out: int, blocks: int, seed: int) -> None:
    d, m, codes = any_q4(out, blocks, seed)
    records = pack_q4(d, m, codes)
    assert records.nbytes == packed_bytes("q4", (out, 32 * blocks)) == -(-out // 32) * 2 * blocks * 320
    expected = codes.reshape(out, blocks, 32) * d.astype(np.float32)[..., None] + m.astype(np.float32)[..., None]
    values = unpack("q4", records, (out, 32 * blocks))
    np.testing.assert_array_equal(values, expected.reshape(out, -1))
    data = records.tobytes()
    for output, number in {(0, 0), (out - 1, 32 * blocks - 1), (out // 2, 13), (out // 3, 22), (out - 1, 7)}:
        assert weight_of_q4(data, blocks, output, number) == values[output, number]


@given(out=st.integers(1, 40), blocks=st.integers(1, 3), seed=st.integers(0, 9))
def test_q4_0_is_q4_without_its_offsets(out: int, blocks: int, seed: int) -> None:
    d, _, codes = any_q4(out, blocks, seed)
    records, longer = pack_q4_0(d, codes), pack_q4(d, np.zeros_like(d), codes)
    assert records.nbytes == packed_bytes("q4_0", (out, 32 * blocks)) == -(-out // 32) * 2 * blocks * 288
    data, others = (array.tobytes() for array in (records, longer))
    assert [data[at : at + 32] + data[at + 32 : at + 288] for at in range(0, len(data), 288)] == [
        others[at : at + 32] + others[at + 64 : at + 320] for at in range(0, len(others), 320)
    ]
    expected = (codes.reshape(out, blocks, 32) - np.float32(8)) * d.astype(np.float32)[..., None]
    np.testing.assert_array_equal(unpack("q4_0", records, (out, 32 * blocks)), expected.reshape(out, -1))


@given(out=st.integers(1, 40), blocks=st.integers(1, 3), seed=st.integers(0, 9))
def test_every_byte_of_q8_is_where_the_format_says(out: int, blocks: int, seed: int) -> None:
    d, codes = any_q8(out, blocks, seed)
    records = pack_q8(d, codes)
    assert records.nbytes == packed_bytes("q8", (out, 32 * blocks)) == -(-out // 32) * 2 * blocks * 544
    expected = codes.reshape(out, blocks, 32) * d.astype(np.float32)[..., None]
    values = unpack("q8", records, (out, 32 * blocks))
    np.testing.assert_array_equal(values, expected.reshape(out, -1))
    data = records.tobytes()
    for output, number in {(0, 0), (out - 1, 32 * blocks - 1), (out // 2, 13), (out // 3, 22), (out - 1, 7)}:
        assert weight_of_q8(data, blocks, output, number) == values[output, number]


@given(out=st.integers(1, 40))
def test_outputs_that_are_only_padding_are_zero(out: int) -> None:
    rows = out + -out % 32
    for kind, records in packed_both_ways(normal(out, 50)):
        assert not unpack(kind, records, (rows, 64))[out:].any()
        codes = np.moveaxis(records["codes"], 3, 1).reshape(rows, -1)  # of each output
        assert not codes[out:].any()


@given(shape=shapes, seed=st.integers(0, 99))
def test_rows_are_those_of_the_matrix(shape: tuple[int, int], seed: int) -> None:
    rows = np.random.default_rng(seed).integers(0, shape[0], 9)
    for kind, records in packed_both_ways(normal(*shape)):
        whole = unpack(kind, records, shape)
        np.testing.assert_array_equal(unpack_rows(kind, records, shape, rows), whole[rows])


@pytest.mark.parametrize(("type_", "kind"), LOSSLESS)
@given(out=st.integers(1, 70), blocks=st.integers(1, 4), seed=st.integers(0, 99))
def test_blocks_of_the_same_form_keep_every_weight(type_: str, kind: Kind, out: int, blocks: int, seed: int) -> None:
    raw = quantize(normal(out, 32 * blocks, seed=seed), Q[type_])
    found = unpack(kind, pack_rows(kind, Q[type_], raw), (out, 32 * blocks))
    np.testing.assert_array_equal(found, dequantize(raw, Q[type_]))


@pytest.mark.parametrize(("type_", "kind"), LOSSLESS)
def test_blocks_of_random_bytes_keep_every_weight(type_: str, kind: Kind) -> None:
    size = GGML_QUANT_SIZES[Q[type_]][1]
    raw = np.random.default_rng(3).integers(0, 256, (64, 5, size), dtype=np.uint8)
    raw[..., 1] &= 0b10111011  # finite scales, and eight times a scale is finite
    raw[..., 3] &= 0b10111011
    raw[raw == 128] = 129
    raw = raw.reshape(64, -1)
    found = unpack(kind, pack_rows(kind, Q[type_], raw), (64, 160))
    np.testing.assert_array_equal(found, dequantize(raw, Q[type_]))


def q4_k_blocks(out: int, blocks: int, seed: int) -> tuple[NDArray[np.uint8], Array, Array]:
    """Random blocks of Q4_K, and the d and dmin of each in float32."""
    random = np.random.default_rng(seed)
    raw = random.integers(0, 256, (out, blocks, 144), dtype=np.uint8)
    halves = random.uniform(0.0001, 0.01, (out, blocks, 2)).astype(np.float16)
    raw[..., :4] = halves.view(np.uint8).reshape(out, blocks, 4)
    d, dmin = np.moveaxis(halves.astype(np.float32), -1, 0)
    return raw.reshape(out, -1), d, dmin


@given(out=st.integers(1, 40), blocks=st.integers(1, 3), seed=st.integers(0, 99))
def test_q4_k_keeps_its_codes_and_rounds_only_the_products_of_its_scales(out: int, blocks: int, seed: int) -> None:
    raw, d, dmin = q4_k_blocks(out, blocks, seed)
    expected = dequantize(raw, Q.Q4_K)
    found = unpack("q4", pack_rows("q4", Q.Q4_K, raw), expected.shape)
    # The scale times 63 x 15 and the offset times 63 at most, each product rounded to eleven bits.
    bound = (d * 63 * 15 + dmin * 63) * 2.0**-11
    assert (np.abs(found - expected).reshape(out, blocks, 256) <= bound[..., None]).all()


def test_q4_k_keeps_every_weight_when_the_products_fit_float16() -> None:
    raw, _, _ = q4_k_blocks(40, 2, 0)
    raw.reshape(40, 2, 144)[..., :4] = np.array([2.0**-9, 2.0**-7], np.float16).view(np.uint8)
    np.testing.assert_array_equal(unpack("q4", pack_rows("q4", Q.Q4_K, raw), (40, 512)), dequantize(raw, Q.Q4_K))


@pytest.mark.parametrize("kind", ["q4", "q8"])
@pytest.mark.parametrize("type_", TENSOR_TYPES)
def test_a_matrix_packed_in_pieces_is_the_matrix_packed_at_once(type_: str, kind: Kind) -> None:
    block, size = GGML_QUANT_SIZES[Q[type_]]
    raw = np.random.default_rng(1).integers(0, 60, (300, 512 // block * size), dtype=np.uint8)
    pieces = list(pack_matrix(kind, Q[type_], raw, 512))
    assert len(pieces) > 1
    np.testing.assert_array_equal(np.concatenate(pieces), pack_rows(kind, Q[type_], raw))


# Weights of all sizes that occur, and of those that do not.
weights = st.builds(
    lambda shape, seed, scale, offset: (normal(*shape, seed=seed) * scale + offset).astype(np.float32),
    shapes,
    st.integers(0, 999),
    st.sampled_from([0.0, 1e-42, 1e-30, 1e-9, 1e-6, 1e-4, 0.02, 1.0, 500.0]),
    st.sampled_from([0.0, 0.0, 1e-5, -0.3, 7.0, -2000.0]),
)


@settings(deadline=None)
@given(values=weights)
def test_eight_bits_are_never_wrong_by_more_than_half_a_scale(values: Array) -> None:
    records = quantise_q8(values)
    d, blocks = scales("q8", records, len(values)), by_block(values)
    error = by_block(unpack("q8", records, values.shape) - values)
    assert (np.abs(error) <= d[..., None] * 0.50001 + 1e-40).all()
    peak = np.abs(blocks).max(axis=-1)
    assert (d <= peak / 124 * (1 + 2.0**-10) + 2.0**-24).all()
    assert np.abs(records["codes"].astype(int)).max() <= 127


@settings(deadline=None)
@given(values=weights)
def test_four_bits_are_no_worse_than_sixteen_steps_from_the_least_to_the_greatest(values: Array) -> None:
    found = unpack("q4", quantise_q4(values), values.shape)
    for row in range(len(values)):
        for first in range(0, values.shape[1], 32):
            block = values[row, first : first + 32].astype(np.float64)
            # The offset is rounded down to float16 and the scale up, so that the steps still reach both ends.
            reach = block if len(block) == 32 else np.append(block, 0.0)  # the last one is filled up with zeros
            slack = max(abs(reach.min()) * 2.0**-10, 2.0**-24)
            step = max((reach.max() - reach.min() + slack) / 15 * (1 + 2.0**-10), 2.0**-24)
            error = block - found[row, first : first + 32]
            assert (error**2).sum() <= 32 * (step * 0.50001) ** 2


@pytest.mark.parametrize(("kind", "peer"), [("q8", "Q8_0"), ("q4", "Q4_1")])
def test_rounding_loses_less_than_that_of_gguf(kind: Kind, peer: str) -> None:
    values = normal(256, 576) * np.float32(0.05)
    quantise = {"q8": quantise_q8, "q4": quantise_q4}[kind]
    ours = np.square(unpack(kind, quantise(values), values.shape) - values).mean()
    theirs = np.square(dequantize(quantize(values, Q[peer]), Q[peer]) - values).mean()
    assert ours < 0.9 * theirs


@pytest.mark.parametrize("constant", [0.0, 1.0, -0.1, 3e-5, 12345.678])
def test_equal_weights_keep_their_value_to_four_digits(constant: float) -> None:
    values = np.full((3, 40), constant, np.float32)
    found = unpack("q4", quantise_q4(values), values.shape)
    np.testing.assert_allclose(found, values, rtol=2e-4, atol=1e-7)


@pytest.mark.parametrize(("kind", "largest"), [("q8", 8_000_000.0), ("q4", 32_000.0)])
def test_the_largest_weights_that_have_a_float16_scale_are_packed_and_larger_ones_refused(
    kind: Kind, largest: float
) -> None:
    quantise = {"q8": quantise_q8, "q4": quantise_q4}[kind]
    values = normal(4, 64)
    values[2, 40] = -largest
    assert unpack(kind, quantise(values), (4, 64))[2, 40] == pytest.approx(-largest, rel=0.01)
    values[2, 40] = largest * 1.1
    with pytest.raises(ModelFileCorrupt, match="beyond"):
        quantise(values)


@pytest.mark.parametrize("kind", ["q4", "q8"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused(kind: Kind, value: float) -> None:
    for type_ in (Q.F32, Q.F16, Q.BF16):
        values = normal(40, 64)
        values[33, 5] = value
        raw = quantize(values, type_).view(np.uint8).reshape(40, -1)
        with pytest.raises(ModelFileCorrupt, match="not finite"):
            pack_rows(kind, type_, raw)


SCALES = {"Q4_0": [0], "Q4_1": [0, 2], "Q4_K": [0, 2], "Q8_0": [0], "Q5_0": [0], "Q5_1": [0, 2], "Q5_K": [0, 2]}
SCALES["Q6_K"] = [208]


@pytest.mark.filterwarnings("ignore::RuntimeWarning:gguf")
@pytest.mark.parametrize("kind", ["q4", "q8"])
@pytest.mark.parametrize(("type_", "at"), [(type_, at) for type_, places in SCALES.items() for at in places])
@pytest.mark.parametrize("bits", [0x7C00, 0xFC00, 0x7E01])
def test_blocks_whose_scale_is_not_finite_are_refused(type_: str, at: int, kind: Kind, bits: int) -> None:
    block, size = GGML_QUANT_SIZES[Q[type_]]
    raw = np.random.default_rng(1).integers(1, 40, (20, 512 // block, size), dtype=np.uint8)
    raw[7, -1, at : at + 2] = np.array([bits], "<u2").view(np.uint8)
    with pytest.raises(ModelFileCorrupt, match="finite") as caught:
        pack_rows(kind, Q[type_], raw.reshape(20, -1))
    assert caught.value.hint


def test_a_q4_0_scale_whose_offset_overflows_is_refused() -> None:
    raw = np.ones((1, 18), np.uint8)
    raw[0, :2] = np.array([9000.0], np.float16).view(np.uint8)
    with pytest.raises(ModelFileCorrupt, match="finite"):
        pack_rows("q4", Q.Q4_0, raw)


def test_minus_128_which_dot_products_have_no_room_for_is_rounded_away() -> None:
    raw = quantize(normal(20, 64), Q.Q8_0)
    raw.reshape(20, 2, 34)[4, 1, 9] = 128
    records = pack_rows("q8", Q.Q8_0, raw)
    assert records["codes"].min() >= -127
    expected = dequantize(raw, Q.Q8_0)
    found = unpack("q8", records, expected.shape)
    assert np.abs(found - expected).max() <= np.abs(expected).max() / 124 / 2 * 1.01
