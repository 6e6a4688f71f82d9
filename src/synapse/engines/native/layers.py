"""LoRA layers in the form the kernel reads: float16 or 8-bit factors in strips (`engine_lora.mojo` describes them)."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Mapping
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from synapse.models.adapter import Adapter, Factor, LoraFactors
from synapse.models.config import PROJECTIONS

Factors = Mapping[tuple[int, str], tuple[NDArray[np.float32], NDArray[np.float32]]]
Precision = Literal["float16", "int8"]
STRIP = 8
GROUP = 16
BLOCK = 32
RECORD = 5
"""Numbers that the kernel has for each linear map: addresses of A, B and scales, rank, bytes of a factor's number."""


class PackedLayer:
    """A layer ready to use. What `LoraLayer` holds in float32 lies here in one array, and in a table for the kernel.

    Attributes:
        id: its sha256.
        bytes: memory it takes.
        rank: the largest rank of its factors, padded to a multiple of 8.
        table: int64[blocks x projections, RECORD].
    """

    def __init__(self, layer_id: str, blocks: int, places: list[_Place], data: NDArray[np.uint8]) -> None:
        self.id = layer_id
        self.rank = max((place.rank for place in places), default=0)
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
        self.a_shape = (self.rank // STRIP, _up(width, BLOCK), STRIP)
        self.b_shape = (_up(out, BLOCK) // GROUP, self.rank, GROUP)
        self.a_offset = offset
        self.b_offset = self.a_offset + _up(int(np.prod(self.a_shape)) * size, 64)
        self.scale_offset = self.b_offset + _up(int(np.prod(self.b_shape)) * size, 64)
        self.end = self.scale_offset + _up(self.rank * 4, 64)

    def views(self, data: NDArray[np.uint8]) -> tuple[NDArray[Any], NDArray[Any], NDArray[np.float32]]:
        """A [strips, in, 8], B [groups, rank, 16] and the scales [rank], in place."""
        dtype = np.float16 if self.size == 2 else np.int8
        a = np.ndarray(self.a_shape, dtype, data, self.a_offset)
        b = np.ndarray(self.b_shape, dtype, data, self.b_offset)
        return a, b, np.ndarray((self.rank,), np.float32, data, self.scale_offset)

    def unpack(self, data: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        rank, width, out = self.shape
        a, b, scales = self.views(data)
        A = a.transpose(0, 2, 1).reshape(self.rank, -1)[:rank, :width].astype(np.float32)
        B = b.transpose(0, 2, 1).reshape(-1, self.rank)[:out, :rank].astype(np.float32) * scales[:rank]
        return A, B


def pack_layer(adapter: Adapter, blocks: int, precision: Precision = "float16") -> PackedLayer:
    """Pack a checked adapter for a model of so many transformer blocks."""
    size = 2 if precision == "float16" else 1
    places, end = [], 0
    for (block, projection), factors in adapter.factors.items():
        rank, width = factors.A.shape
        place = _Place(block, projection, (rank, width, len(factors.B)), size, end)
        places.append(place)
        end = place.end
    data = huge_zeros(end)
    for place, factors in zip(places, adapter.factors.values(), strict=True):
        _fill(place, factors, data)
    return PackedLayer(adapter.sha256, blocks, places, data)


def huge_zeros(size: int) -> NDArray[np.uint8]:
    """Zeros in huge pages where the system has them: a step reads all layers of its batch, page after page."""
    mapping = mmap.mmap(-1, max(size, 1))
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a system without them
            mapping.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(mapping, np.uint8, size)


def _fill(place: _Place, factors: LoraFactors, data: NDArray[np.uint8]) -> None:
    rank, width, out = place.shape
    a, b, scales = place.views(data)
    A, a_scale = _fitted(factors.A, place.size, axis=1)
    B, b_scale = _fitted(factors.B, place.size, axis=0)
    scales[:rank] = np.float32(factors.scale) * a_scale * b_scale
    if rank == place.rank:
        a[:, :width] = A.reshape(-1, STRIP, width).transpose(0, 2, 1)
    else:
        padded = np.zeros((place.rank, width), a.dtype)
        padded[:rank] = A
        a[:, :width] = padded.reshape(-1, STRIP, width).transpose(0, 2, 1)
    full = out // GROUP
    b[:full, :rank] = B[: full * GROUP].reshape(full, GROUP, rank).transpose(0, 2, 1)
    if out % GROUP:
        b[full, :rank, : out % GROUP] = B[full * GROUP :].T


def _fitted(factor: Factor, size: int, axis: int) -> tuple[NDArray[Any], NDArray[np.float32]]:
    """A factor in the range of its stored numbers, and what it must be multiplied with, one number per rank.

    Float16 takes a power of two, which loses nothing; integers take each rank's largest value to 127.
    """
    if factor.dtype == np.float16 and size == 2:
        return factor, np.ones(1, np.float32)
    if size == 2:
        exponent = int(np.frexp(max(factor.max(initial=0), -factor.min(initial=0)))[1])
        exponent = min(max(exponent, -100), 127)  # so that both powers are float32 numbers
        return (factor * np.float32(2.0**-exponent)).astype(np.float16), np.full(1, 2.0**exponent, np.float32)
    values = factor.astype(np.float32)
    scale = np.abs(values).max(axis=axis) / np.float32(127)
    safe = np.where(scale > 0, scale, 1)
    return np.rint(values / np.expand_dims(safe, axis)).astype(np.int8), scale


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
