"""Arguments of a call, handed to another process: a small pickle, and the bytes of arrays in memory that both map.

Pickle protocol 5 hands out the buffers of contiguous arrays separately (PEP 574); they are copied once, into a block
that the other process reads in place. The block is a file without a name, so nothing is left behind however either of
them ends.
"""

from __future__ import annotations

import mmap
import os
import pickle
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

ALIGNMENT = 64
SMALLEST = 2**20


@dataclass(frozen=True, slots=True)
class PackedCall:
    """A call on its way: the pickle, where its buffers lie in the block, and how long the block is."""

    pickled: bytes
    places: tuple[tuple[int, int], ...]
    size: int


class SharedBlock:
    """Memory that two processes map through one open file. Only one side writes, and never while the other reads."""

    def __init__(self, descriptor: int | None = None) -> None:
        """Make a block, or map the one of this open file."""
        self.descriptor = _nameless_file() if descriptor is None else descriptor
        self._size = 0
        self._map: mmap.mmap | None = None

    def pack(self, values: Any, limit: int) -> PackedCall:
        """Put values into the block.

        Raises:
            ValueError: their arrays have more than `limit` bytes together.
            OSError: there is no room for them.
            pickle.PicklingError, TypeError, AttributeError: they cannot be sent to another process.
        """
        buffers: list[pickle.PickleBuffer] = []
        pickled = pickle.dumps(values, protocol=5, buffer_callback=buffers.append)
        views = [buffer.raw() for buffer in buffers]
        places: list[tuple[int, int]] = []
        end = 0
        for view in views:
            places.append((end, view.nbytes))
            end += -(-view.nbytes // ALIGNMENT) * ALIGNMENT
        if end + len(pickled) > limit:
            raise ValueError(f"{end + len(pickled)} bytes are more than {limit}")
        if end > self._size:
            size = max(SMALLEST, 1 << (end - 1).bit_length())
            os.ftruncate(self.descriptor, size)
            self._remap(size)
        if end and hasattr(os, "posix_fallocate"):  # a hole in a file faults where there is no room for its page
            os.posix_fallocate(self.descriptor, 0, end)
        for view, (start, length) in zip(views, places, strict=True):
            if length and self._map is not None:
                self._map[start : start + length] = view
        return PackedCall(pickled, tuple(places), self._size)

    def unpack(self, packed: PackedCall) -> Any:
        """The values of a packed call; their arrays are read-only, and in the block until the next one is packed."""
        if packed.size > self._size:
            self._remap(packed.size)
        whole = memoryview(self._map).toreadonly() if self._map is not None else memoryview(b"")
        buffers: Sequence[memoryview] = [whole[start : start + length] for start, length in packed.places]
        return pickle.loads(packed.pickled, buffers=buffers)  # noqa: S301 (from our own parent process)

    def close(self) -> None:
        """Give the memory back."""
        if self._map is not None:
            self._map.close()
            self._map = None
        os.close(self.descriptor)

    def _remap(self, size: int) -> None:
        # The old mapping is not closed: arrays of the call before may still lie in it. It goes when they do.
        self._map = mmap.mmap(self.descriptor, size)
        self._size = size


def _nameless_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("synapse-hotpath")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
