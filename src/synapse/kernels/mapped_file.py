"""A file in memory that is read where it lies: shared by all processes, and loaded by the page as it is used."""

from __future__ import annotations

import mmap
from typing import IO

from synapse.kernels.fatal_signals import guard


class MappedFile:
    """The map of an open file, for reading. One that is cut short afterwards reads as zeros there: see `lost`.

    Attributes:
        memory: its bytes. The map lives as long as anything that refers to them.
    """

    def __init__(self, file: IO[bytes]) -> None:
        """Map a file that is not empty; it may be closed then.

        Raises:
            OSError, ValueError: it cannot be mapped, or is empty.
        """
        self.memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._guarded = guard(self.memory)

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """In another process there is a copy of what was sent of it, and no file: None."""
        return type(None), ()

    @property
    def lost(self) -> bool:
        """Whether the file was cut short under the map, or cannot be read: what was read of it may be zeros."""
        return self._guarded.lost
