"""LoRA layers in the form the kernel reads: float16 or 8-bit factors in strips (`engine_lora.mojo` describes them)."""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Mapping
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from synapse.models.adapters.adapter import Adapter, LoraFactors
from synapse.models.config import PROJECTIONS

Factors = Mapping[tuple[int, str], tuple[NDArray[np.float32], NDArray[np.float32]]]
Precision = Literal["float16", "int8"]
STRIP = 8
GROUP = 16
BLOCK = 32
SMALLEST = 1e-36
"""Scales below it count as zero: their inverse would not be a float32 number."""
RECORD = 5
"""Numbers that the kernel has for each linear map: addresses of A, B and scales, rank, bytes of a factor's number."""


class PackedLayer:
    """A layer ready to use. What `LoraLayer` holds in float32 lies here in one array, and in a table for the kernel.

    Attributes:
        id: its sha256.
        bytes: memory it takes.
        rank: the largest rank of its factors, padded to a multiple of 8.
        narrow: whether its factors have 8 bits.
        table: int64[blocks x projections, RECORD].
    """

    def __init__(self, layer_id: str, blocks: int, places: list[_Place], data: NDArray[np.uint8]) -> None:
        self.id = layer_id
        self.rank = max((place.rank for place in places), default=0)
        self.narrow = any(place.size == 1 for place in places)
        self.bytes = data.nbytes
        self._blocks = blocks
        self._places = places
        self._data = data
        self.table = np.zeros((blocks * len(PROJECTIONS), RECORD), np.int64)
        base = data.__array_interface__["data"][0]
        for place in places:
            row = place.block * len(PROJECTIONS) + PROJECTIONS.index(place.projection)
            self.table[row] = (
                *(base + offset for offset in (place.a_offset, place.b_offset, place.scale_offset)),
                place.rank,
                place.size,
            )
        self.address: int = self.table.__array_interface__["data"][0]

    def __reduce__(self) -> tuple[Any, ...]:
        return PackedLayer, (self.id, self._blocks, self._places, self._data)

    @cached_property
    def factors(self) -> Factors:
        """The factors in float32, as the reference uses them."""
        return {(place.block, place.projection): place.unpack(self._data) for place in self._places}


class _Place:
    """Where the factors of one linear map are in a layer's data."""

    def __init__(self, block: int, projection: str, shape: tuple[int, int, int], size: int, offset: int) -> None:
        rank, width, out = shape
        self.block, self.projection, self.shape, self.size = block, projection, shape, size
        self.rank = _up(rank, STRIP)
        self.run = 4 if size == 1 else 1
        self.a_shape = (self.rank // STRIP, _up(width, BLOCK) // self.run, STRIP, self.run)
        self.b_shape = (_up(out, BLOCK) // GROUP, self.rank // self.run, GROUP, self.run)
        self.a_offset = offset
        self.b_offset = self.a_offset + _up(math.prod(self.a_shape) * size, 64)
        self.scale_offset = self.b_offset + _up(math.prod(self.b_shape) * size, 64)
        self.end = self.scale_offset + _up(self.rank * 4, 64)

    def views(self, data: NDArray[np.uint8]) -> tuple[NDArray[Any], NDArray[Any], NDArray[np.float32]]:
        """A [strips, in/run, 8, run], B [groups, rank/run, 16, run] and the scales [rank], in place.

        The run is 4 for integers, 1 for float16.
        """
        dtype = np.float16 if self.size == 2 else np.int8
        a = np.ndarray(self.a_shape, dtype, data, self.a_offset)
        b = np.ndarray(self.b_shape, dtype, data, self.b_offset)
        return a, b, np.ndarray((self.rank,), np.float32, data, self.scale_offset)

    def unpack(self, data: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        rank, width, out = self.shape
        a, b, scales = self.views(data)
        A = a.swapaxes(1, 2).reshape(self.rank, -1)[:rank, :width].astype(np.float32)
        B = b.swapaxes(1, 2).reshape(-1, self.rank)[:out, :rank].astype(np.float32) * scales[:rank]
        return A, B


def pack_layer(adapter: Adapter, blocks: int, precision: Precision = "int8") -> PackedLayer:
    """Pack a checked adapter for a model of so many transformer blocks.

    Factors of one form lie one after another and are packed together: a layer has hundreds, and a call of NumPy takes
    as long as a thousand numbers.
    """
    size = 2 if precision == "float16" else 1
    alike: dict[tuple[object, ...], list[tuple[int, str]]] = {}
    for (block, projection), factors in adapter.factors.items():
        form = (factors.A.shape, factors.B.shape, factors.A.dtype, factors.B.dtype)
        alike.setdefault(form, []).append((block, projection))
    groups, end = [], 0
    for keys in alike.values():
        group = []
        for block, projection in keys:
            factors = adapter.factors[block, projection]
            rank, width = factors.A.shape
            group.append(_Place(block, projection, (rank, width, len(factors.B)), size, end))
            end = group[-1].end
        groups.append(group)
    data = huge_zeros(end)
    for group in groups:
        _fill(group, [adapter.factors[place.block, place.projection] for place in group], data)
    return PackedLayer(adapter.sha256, blocks, [place for group in groups for place in group], data)


def huge_zeros(size: int) -> NDArray[np.uint8]:
    """Zeros in huge pages where the system has them: a step reads all layers of its batch, page after page."""
    if not hasattr(mmap, "MAP_PRIVATE"):  # Windows
        return np.zeros(size, np.uint8)
    mapping = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a system without them
            mapping.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(mapping, np.uint8, size)


@np.errstate(over="ignore")  # a layer that overflows shows in the logits of its own sequence
def _fill(group: list[_Place], factors: list[LoraFactors], data: NDArray[np.uint8]) -> None:
    """Write factors of one form, whose places follow one another."""
    first = group[0]
    rank, _, out = first.shape
    step, count = first.end - first.a_offset, len(group)

    def across(view: NDArray[Any]) -> NDArray[Any]:
        """The same part of every place, [count, …]."""
        return np.lib.stride_tricks.as_strided(view, (count, *view.shape), (step, *view.strides))

    a, b, scales = (across(view) for view in first.views(data))
    A, a_scale = _fitted(np.stack([pair.A for pair in factors]), first.size, axis=2)
    B, b_scale = _fitted(np.stack([pair.B for pair in factors]), first.size, axis=1)
    own = np.array([pair.scale for pair in factors], np.float32)[:, None]
    scales[:, :rank] = own * a_scale * b_scale
    A, B = _padded(A, 1, STRIP), _padded(B, 2, STRIP)
    word = A.dtype if first.run == 1 else np.dtype(f"u{first.run}")  # a run of numbers moves as one
    A, B = _padded(A, 2, first.run).view(word), B.view(word)
    a, b = a.view(word)[..., 0], b.view(word)[..., 0]
    a[:, :, : A.shape[2]] = A.reshape(count, -1, STRIP, A.shape[2]).swapaxes(2, 3)
    full = out // GROUP
    b[:, :full] = B[:, : full * GROUP].reshape(count, full, GROUP, B.shape[2]).swapaxes(2, 3)
    if out % GROUP:
        b[:, full, :, : out % GROUP] = B[:, full * GROUP :].swapaxes(1, 2)


def _padded(array: NDArray[Any], axis: int, multiple: int) -> NDArray[Any]:
    """The array with zeros behind, so that an axis has a multiple of some length."""
    missing = -array.shape[axis] % multiple
    if not missing:
        return np.ascontiguousarray(array)
    return np.pad(array, [(0, missing if at == axis else 0) for at in range(array.ndim)])


def _fitted(stack: NDArray[Any], size: int, axis: int) -> tuple[NDArray[Any], NDArray[np.float32]]:
    """Factors in the range of their stored numbers, and what each must be multiplied with, [count, rank] or [count, 1].

    Float16 takes a power of two for each factor, which loses nothing; integers take each rank's largest value to 127.
    """
    if stack.dtype == np.float16 and size == 2:
        return stack, np.ones((len(stack), 1), np.float32)
    values = _floats(stack)  # a copy, which becomes the codes
    if size == 2:
        tops = np.maximum(values.max(axis=(1, 2), initial=0), -values.min(axis=(1, 2), initial=0))
        exponents = np.clip(np.frexp(tops)[1], -100, 127)  # so that both powers are float32 numbers
        values *= np.ldexp(np.float32(1), -exponents)[:, None, None]
        return values.astype(np.float16), np.ldexp(np.float32(1), exponents)[:, None]
    folded = values
    if axis == 1 and values.shape[1] % GROUP == 0:  # long rows are found the largest of much faster than short ones
        folded = values.reshape(len(values), -1, GROUP * values.shape[2])
    tops = np.maximum(folded.max(axis=axis, initial=0), -folded.min(axis=axis, initial=0))
    if folded is not values:
        tops = tops.reshape(len(values), GROUP, -1).max(axis=1)
    scale = tops / np.float32(127)
    inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale > SMALLEST)
    values *= np.expand_dims(inverse, axis)
    return np.rint(values, out=values).astype(np.int8), scale


def _floats(stack: NDArray[Any]) -> NDArray[np.float32]:
    """A copy in float32. Halves are widened by integer arithmetic, three times as fast as NumPy converts them."""
    if stack.dtype != np.float16:
        return stack.astype(np.float32)
    bits = stack.view(np.int16).astype(np.int32)
    bits <<= 13  # sign and fraction are where a float32 has them, the exponent is 112 too low
    bits &= ~0x70000000
    values = bits.view(np.float32)
    values *= np.float32(2.0**112)
    return values


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
