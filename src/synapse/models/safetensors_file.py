"""Reading a safetensors file from a stranger.

Format (huggingface/safetensors, "Format" in its README): eight bytes with the length N of the header as an unsigned
little-endian integer; N bytes of UTF-8 JSON that begin with `{` and may end in spaces; then the data. The JSON maps
each tensor to its `dtype`, `shape` and `data_offsets` [begin, end) counted from the start of the data. The tensors
fill the data exactly: no gap, no overlap, no byte left over. `__metadata__` maps text to text.

NumPy has no bfloat16, and every claim is checked before a byte is used, so the file is read here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from mmap import mmap
from typing import Any

import numpy as np
from numpy.typing import NDArray

from synapse.models.adapters.errors import LayerCorrupt, LayerRefused

MAX_HEADER_BYTES = 2**20
MAX_DIMENSIONS = 8
ITEM_BYTES: Mapping[str, int] = {"F32": 4, "F16": 2, "BF16": 2}
"""The types that `read_tensor` turns into float32."""
_EXPONENT = {"F32": ("<u4", 0x7F800000), "F16": ("<u2", 0x7C00), "BF16": ("<u2", 0x7F80)}
"""Words of that size, and the bits of the exponent in them."""
_PIECE = 2**16
"""Words looked at together: they stay in the cache."""
HINT = "the file is damaged or was not written whole: fetch or save it again"


@dataclass(frozen=True, slots=True)
class TensorSlot:
    """Where one tensor lies: `begin` and `end` count from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class DuplicateKey(ValueError):
    """A JSON object names the same key twice, so two readers could see two different files."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise DuplicateKey("a key is written twice in one object")
    return found


def parse_json_object(raw: bytes, what: str) -> dict[str, Any]:
    """A JSON object from outside.

    Raises:
        LayerCorrupt: not UTF-8, not JSON, nested too deeply, a key twice, or not an object (``bad_json``).
    """
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        why = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise LayerCorrupt("bad_json", f"{what} is not valid JSON: {why}", hint=HINT) from error
    if not isinstance(value, dict):
        raise LayerCorrupt("bad_json", f"{what} must be a JSON object, not {type(value).__name__}", hint=HINT)
    return value


def _whole(values: list[Any]) -> bool:
    return all([type(value) is int and 0 <= value < 2**63 for value in values])  # noqa: C419 (a generator is slower)


def _slot(name: str, entry: object, start: int, size: int, item_bytes: Mapping[str, int]) -> TensorSlot:
    """One entry of the header, checked against the `size` of the file whose data begins at `start`."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise LayerCorrupt("bad_header", f"tensor {name!r} needs dtype, shape and data_offsets", hint=HINT)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in item_bytes:
        raise LayerRefused(
            "bad_dtype",
            f"tensor {name!r} has the type {dtype!r}; what is read is {', '.join(item_bytes)}",
            hint="save it in float32, float16 or bfloat16",
        )
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or not _whole(shape):
        raise LayerCorrupt("bad_header", f"tensor {name!r} has no valid shape", hint=HINT)
    if not isinstance(offsets, list) or len(offsets) != 2 or not _whole(offsets):
        raise LayerCorrupt("bad_header", f"tensor {name!r} has no valid data_offsets", hint=HINT)
    begin, end = start + offsets[0], start + offsets[1]
    if end > size:
        raise LayerCorrupt(
            "truncated", f"tensor {name!r} should end at byte {end}, but the file has {size} bytes", hint=HINT
        )
    if end - begin != math.prod(shape) * item_bytes[dtype]:
        raise LayerCorrupt(
            "size_lie",
            f"tensor {name!r} says {dtype}{shape}, {math.prod(shape) * item_bytes[dtype]} bytes, "
            f"but its offsets span {end - begin}",
            hint=HINT,
        )
    return TensorSlot(dtype, tuple(shape), begin, end)


def read_header(data: bytes | mmap, item_bytes: Mapping[str, int] = ITEM_BYTES) -> Mapping[str, TensorSlot]:
    """Every tensor of the file and where it lies, in the order of the data.

    Args:
        item_bytes: the types that a tensor may have, and the bytes of one number.

    Raises:
        LayerCorrupt: ``truncated``, ``bad_json``, ``bad_header``, or ``size_lie`` when lengths and offsets do not
            add up to the file.
        LayerRefused: ``bad_dtype``.
    """
    size = len(data)
    if size < 8:
        raise LayerCorrupt("truncated", f"a safetensors file has at least 8 bytes, this one {size}", hint=HINT)
    length = int.from_bytes(data[:8], "little")
    if length > MAX_HEADER_BYTES:
        raise LayerCorrupt(
            "size_lie", f"the header says it has {length} bytes; at most {MAX_HEADER_BYTES} are read", hint=HINT
        )
    start = 8 + length
    if start > size:
        raise LayerCorrupt(
            "truncated", f"the header says it has {length} bytes, but the file has {size} in all", hint=HINT
        )
    raw = data[8:start]
    if not raw.startswith(b"{"):
        raise LayerCorrupt("bad_header", "the header of a safetensors file begins with '{'", hint=HINT)
    header = parse_json_object(raw, "the header of the safetensors file")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise LayerCorrupt("bad_header", "__metadata__ must map text to text", hint=HINT)
    slots = {name: _slot(name, entry, start, size, item_bytes) for name, entry in header.items()}
    ordered = dict(sorted(slots.items(), key=lambda item: (item[1].begin, item[1].end)))
    position = start
    for name, slot in ordered.items():
        if slot.begin != position:
            fault = "overlaps the one before it" if slot.begin < position else "leaves a gap before it"
            raise LayerCorrupt("size_lie", f"tensor {name!r} {fault}", hint=HINT)
        position = slot.end
    if position != size:
        raise LayerCorrupt("size_lie", f"the tensors end at byte {position}, but the file has {size} bytes", hint=HINT)
    return ordered


def not_finite(data: bytes | mmap, slots: Mapping[str, TensorSlot]) -> str | None:
    """The first tensor with a value that is NaN or infinite, or None: one whose bits of the exponent are all ones.

    Args:
        slots: of `read_header`; they follow one another without a gap.
    """
    for names in _of_one_type(slots):
        word, exponent = _EXPONENT[slots[names[0]].dtype]
        begin, end = slots[names[0]].begin, slots[names[-1]].end
        words = np.frombuffer(data, word, (end - begin) // np.dtype(word).itemsize, begin)
        for first in range(0, len(words), _PIECE):
            if (words[first : first + _PIECE] & exponent).max() == exponent:
                bad = begin + words.itemsize * int(((words & exponent) == exponent).argmax())
                return next(name for name in names if slots[name].end > bad)
    return None


def _of_one_type(slots: Mapping[str, TensorSlot]) -> list[list[str]]:
    """The names of tensors of one type that follow one another."""
    return [list(names) for _, names in groupby(slots, lambda name: slots[name].dtype)]


def read_tensor(data: bytes | mmap, slot: TensorSlot) -> NDArray[np.float32]:
    """The values as float32, in the slot's shape; a copy that does not keep `data` alive."""
    return read_stored(data, slot).astype(np.float32, copy=False)


def read_stored(data: bytes | mmap, slot: TensorSlot) -> NDArray[np.float32] | NDArray[np.float16]:
    """As `read_tensor`, but float16 stays float16, and where it is in `data` if its numbers are aligned there."""
    raw = memoryview(data)[slot.begin : slot.end]
    if slot.dtype == "F16":
        return np.frombuffer(raw, dtype="<f2").astype(np.float16, copy=slot.begin % 2 != 0).reshape(slot.shape)
    if slot.dtype == "F32":
        values = np.frombuffer(raw, dtype="<f4").astype(np.float32)
    else:  # a bfloat16 is the upper half of a float32
        values = (np.frombuffer(raw, dtype="<u2").astype(np.uint32) << 16).view(np.float32)
    return values.reshape(slot.shape)
