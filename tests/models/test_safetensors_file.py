"""A safetensors file that lies: every claim in its header is checked before a byte is used."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save

from synapse.models.adapters.errors import LayerCorrupt, LayerRefused
from synapse.models.safetensors_file import MAX_HEADER_BYTES, not_finite, read_header, read_tensor


def built(header: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def entry(begin: int, end: int, shape: list[int] | None = None, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape or [(end - begin) // 4], "data_offsets": [begin, end]}


def reason(data: bytes) -> str:
    with pytest.raises(LayerRefused) as caught:
        read_header(data)
    return caught.value.reason


@given(
    st.dictionaries(
        st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__"),
        st.lists(st.integers(0, 4), min_size=0, max_size=3),
        min_size=1,
        max_size=4,
    )
)
def test_what_safetensors_writes_is_read_back(shapes: dict[str, list[int]]) -> None:
    generator = np.random.default_rng(0)
    tensors = {name: generator.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    data = save(tensors)
    slots = read_header(data)
    assert slots.keys() == tensors.keys()
    for name, slot in slots.items():
        np.testing.assert_array_equal(read_tensor(data, slot), tensors[name])


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    try:
        read_header(data)
    except LayerRefused as error:
        assert error.reason


@given(st.data())
def test_one_changed_byte_of_the_header_never_reads_outside_the_file(data: st.DataObject) -> None:
    sound = bytearray(save({"a": np.ones((2, 3), np.float32), "b": np.ones(4, np.float16)}))
    position = data.draw(st.integers(0, int.from_bytes(sound[:8], "little") + 7))
    sound[position] = data.draw(st.integers(0, 255))
    try:
        slots = read_header(bytes(sound))
    except LayerRefused:
        return
    for slot in slots.values():
        assert read_tensor(bytes(sound), slot).shape == slot.shape


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (built({}, length=MAX_HEADER_BYTES + 1), "size_lie"),
        (built({}, length=2**63), "size_lie"),
        (built({"a": entry(0, 8)}, b"12345678", length=500), "truncated"),
        (built({"a": entry(0, 80)}, b"12345678"), "truncated"),
        (built({"a": entry(0, 8, [3])}, b"12345678"), "size_lie"),
        (built({"a": entry(0, 8, [2**62, 2**62, 2**62])}, b"12345678"), "size_lie"),
        (built({"a": entry(8, 0, [2])}, b"12345678"), "size_lie"),
        (built({"a": entry(0, 8), "b": entry(4, 12)}, b"123456789012"), "size_lie"),
        (built({"a": entry(0, 4), "b": entry(8, 12)}, b"123456789012"), "size_lie"),
        (built({"a": entry(4, 8)}, b"12345678"), "size_lie"),
        (built({"a": entry(0, 8)}, b"12345678 and more"), "size_lie"),
        (built(b" {}"), "bad_header"),
        (built(b"[]"), "bad_header"),
        (built(b"{"), "bad_json"),
        (built(b'{"a": 1, "a": 2}'), "bad_json"),
        (built({"a": [0, 8]}, b"12345678"), "bad_header"),
        (built({"a": {"dtype": "F32", "shape": [2]}}, b"12345678"), "bad_header"),
        (built({"a": entry(0, 8) | {"shape": "2"}}, b"12345678"), "bad_header"),
        (built({"a": entry(0, 8) | {"shape": [-2]}}, b"12345678"), "bad_header"),
        (built({"a": entry(0, 8) | {"shape": [2.0]}}, b"12345678"), "bad_header"),
        (built({"a": entry(0, 8) | {"shape": [1] * 9}}, b"12345678"), "bad_header"),
        (built({"a": entry(0, 8) | {"data_offsets": [0]}}, b"12345678"), "bad_header"),
        (built({"a": entry(0, 8) | {"data_offsets": [-8, 0]}}, b"12345678"), "bad_header"),
        (built({"__metadata__": {"format": 1}}), "bad_header"),
        (built({"a": entry(0, 8, dtype="F64")}, b"12345678"), "bad_dtype"),
        (built({"a": entry(0, 8) | {"dtype": ["F32"]}}, b"12345678"), "bad_dtype"),
    ],
)
def test_a_lie_in_the_header_is_named(data: bytes, expected: str) -> None:
    assert reason(data) == expected


def test_damage_is_told_apart_from_what_is_merely_not_supported() -> None:
    with pytest.raises(LayerCorrupt):
        read_header(b"")
    with pytest.raises(LayerRefused) as caught:
        read_header(built({"a": entry(0, 8, dtype="I32")}, b"12345678"))
    assert not isinstance(caught.value, LayerCorrupt)


@pytest.mark.parametrize("spaces", [0, 1])
@pytest.mark.parametrize("value", [None, np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("which", range(5))
def test_the_tensor_that_is_not_finite_is_named(which: int, value: float | None, spaces: int) -> None:
    """Whatever the types of its neighbours, and wherever the data begins; the largest finite numbers are finite."""
    header, parts, begin = {}, [], 0
    for number, dtype in enumerate(("F16", "F16", "F32", "BF16", "F16")):
        values = np.full(70_000, np.finfo(np.float16).max if dtype == "F16" else np.float32(3.38e38), np.float32)
        if number == which and value is not None:
            values[-1] = value
        words = values.astype("<f2") if dtype == "F16" else values
        raw = (values.view("<u4") >> 16).astype("<u2").tobytes() if dtype == "BF16" else words.tobytes()
        header[str(number)] = entry(begin, begin + len(raw), [len(values)], dtype)
        parts.append(raw)
        begin += len(raw)
    data = built(json.dumps(header).encode() + b" " * spaces, b"".join(parts))
    assert not_finite(data, read_header(data)) == (None if value is None else str(which))
