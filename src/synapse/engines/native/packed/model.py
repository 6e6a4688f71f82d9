"""A packed model in memory: its tensors where they lie, as native code reads them, and as float32."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from gguf.constants import GGMLQuantizationType
from numpy.typing import NDArray

from synapse.engines.native.packed.packing import GROUP, Kind, group_bytes, pack_rows, unpack, unpack_rows
from synapse.errors import NotFound, Unavailable
from synapse.kernels.mapped_file import MappedFile
from synapse.models.config import ModelConfig

Quantisation = Literal["auto", "int8", "4bit"]
"""`auto` keeps 4-bit and 8-bit blocks as the file has them and rounds the rest to 8 bits; the others round all."""
TensorKind = Kind | Literal["f32"]
ALIGNMENT = 64
"""Of every tensor, in bytes from the start of the payload."""


@dataclass(frozen=True, slots=True)
class Slot:
    """Where a tensor lies: `offset` counts from the start of the payload. `shape` is [out, in] or [n], unpadded."""

    kind: TensorKind
    shape: tuple[int, ...]
    offset: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Checked:
    """A packed file that was found to be sound, and what it looked like then.

    Attributes:
        payload_sha256: of its payload, in hexadecimal.
        look: device, inode, size, and times of change in nanoseconds.
    """

    payload_sha256: str
    look: tuple[int, ...]


class PackedModel:
    """An open packed model. Read-only, and safe to use from several threads.

    Attributes:
        config: what the model looks like.
        quantisation: how it was packed.
        bytes: of all its tensors, as they lie in memory.
        checked: the file that it was opened from.
    """

    def __init__(
        self,
        config: ModelConfig,
        quantisation: Quantisation,
        slots: dict[str, Slot],
        payload: NDArray[np.uint8],
        file: MappedFile | None = None,
        *,
        checked: Checked | None = None,
    ) -> None:
        self.config = config
        self.quantisation = quantisation
        self.bytes = len(payload)
        self._slots = slots
        self._payload: NDArray[np.uint8] | None = payload
        self.checked = checked
        self._file = file

    @classmethod
    def of(cls, config: ModelConfig, tensors: Mapping[str, NDArray[np.float32]], kind: Kind) -> PackedModel:
        """A packed model in memory: matrices of that kind, rounded, and vectors as they are."""
        parts, slots, end = [], {}, 0
        for name, values in tensors.items():
            data = np.ascontiguousarray(values, "<f4").view(np.uint8)
            if values.ndim == 2:
                data = pack_rows(kind, GGMLQuantizationType.F32, data)
            flat = data.reshape(-1).view(np.uint8)
            slots[name] = Slot(kind if values.ndim == 2 else "f32", values.shape, end, len(flat))
            parts += [flat, np.zeros(-len(flat) % ALIGNMENT, np.uint8)]
            end += len(flat) + -len(flat) % ALIGNMENT
        room = np.empty(end + ALIGNMENT, np.uint8)
        start = -room.ctypes.data % ALIGNMENT
        return cls(config, "auto", slots, np.concatenate(parts, out=room[start : start + end]))

    @property
    def names(self) -> tuple[str, ...]:
        """The GGUF names of the tensors."""
        return tuple(self._slots)

    def kind(self, name: str) -> TensorKind:
        """How a tensor is stored."""
        return self._slot(name).kind

    def shape(self, name: str) -> tuple[int, ...]:
        """[out, in] of a matrix, without padding, or [n] of a vector."""
        return self._slot(name).shape

    def array(self, name: str) -> NDArray[Any]:
        """A tensor where it lies: uint8[bytes] of a matrix' records, or a vector in float32."""
        slot, data = self._find(name)
        return data.view("<f4") if slot.kind == "f32" else data

    def address(self, name: str) -> int:
        """Where a tensor begins in memory, a multiple of 64, for native code; good until `close`."""
        return int(self._find(name)[1].ctypes.data)

    def matrix(self, name: str, first: int = 0, last: int | None = None) -> NDArray[np.float32]:
        """The rows `first` to `last` (all, when left out) of a matrix, float32[rows, in]; `first` a multiple of 16."""
        slot, data = self._find(name)
        if slot.kind == "f32":
            raise NotFound(f"{name} is a vector, not a matrix")
        last = slot.shape[0] if last is None else last
        group = group_bytes(slot.kind, slot.shape[1])
        piece = data[first // GROUP * group : -(-last // GROUP) * group]
        return unpack(slot.kind, piece, (last - first, slot.shape[1]))

    def rows(self, name: str, rows: NDArray[np.intp]) -> NDArray[np.float32]:
        """Some rows of a matrix, float32[len(rows), in]."""
        slot, data = self._find(name)
        if slot.kind == "f32":
            raise NotFound(f"{name} is a vector, not a matrix")
        return unpack_rows(slot.kind, data, (slot.shape[0], slot.shape[1]), rows)

    def check(self) -> None:
        """Refuse what was computed with weights that are no longer there.

        Raises:
            Unavailable: the file was cut short, or its disk is gone, since it was opened.
        """
        if self._file is not None and self._file.lost:
            raise Unavailable(
                "the packed model was cut short, or its disk is gone, while it was in use",
                hint="start again: it is made anew",
            )

    def close(self) -> None:
        """Let go of the map. It goes with the last array that was handed out; addresses are void at once."""
        self._payload = None

    def _slot(self, name: str) -> Slot:
        if name not in self._slots:
            raise NotFound(f"the model has no tensor {name!r}")
        return self._slots[name]

    def _find(self, name: str) -> tuple[Slot, NDArray[np.uint8]]:
        slot = self._slot(name)
        if self._payload is None:
            raise ValueError("the packed model is closed")
        return slot, self._payload[slot.offset : slot.offset + slot.bytes]
