"""The flight recorder: which kernel each thread of a process is running, kept where a crash cannot lose it.

One small memory-mapped file a process. Before a native call a thread writes the number of the build into its slot, and
0 after it: two stores of eight bytes. The pages are the operating system's, so they outlive the process. The process
holds a lock on its file for as long as it lives; a file that nobody holds is of a process that is gone, and what its
slots name was running when it died. (A lock cannot be mistaken the way a process number can, which is used again.)

Format: the magic, 64 names of builds of 256 bytes each (UTF-8, zero-padded: path, a space, build), then `SLOTS`
integers of eight bytes.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from synapse.errors import Overloaded
from synapse.hotpath.metrics.lanes import SLOTS

MAGIC = b"SYNFLT01"
NAMES = 64
NAME_BYTES = 256
FIRST_SLOT = len(MAGIC) + NAMES * NAME_BYTES
FILE_BYTES = FIRST_SLOT + 8 * SLOTS
SUFFIX = ".flight"


@dataclass(frozen=True, slots=True)
class Culprit:
    """A build that was running in a process that died."""

    path: str
    build: str
    process: str


class FlightRecorder:
    """The file of this process. `slots[i]` is 0, or the number of the build that the thread with slot i is running."""

    def __init__(self, folder: Path) -> None:
        """Open a new file in a folder that exists.

        Raises:
            OSError: the file cannot be made.
        """
        # Made under another name and locked first: a file that can be found is always held by its process.
        handle, name = tempfile.mkstemp(prefix=f"{os.getpid()}-", suffix=".new", dir=folder)
        self._file: IO[bytes] = os.fdopen(handle, "r+b")
        _lock(self._file)
        self._file.truncate(FILE_BYTES)
        self._map = mmap.mmap(self._file.fileno(), FILE_BYTES)
        self._map[: len(MAGIC)] = MAGIC
        self.slots = memoryview(self._map)[FIRST_SLOT:].cast("Q")
        self._numbers: dict[str, int] = {}
        self.file = Path(name).with_suffix(SUFFIX)
        Path(name).rename(self.file)

    def number_of(self, path: str, build: str) -> int:
        """The number that stands for a build in a slot, from 1.

        Raises:
            Overloaded: the file names 64 builds already.
        """
        name = f"{path} {build}"
        if name not in self._numbers:
            if len(self._numbers) == NAMES:
                raise Overloaded(f"this process has run {NAMES} builds of kernels already", hint="restart it")
            start = len(MAGIC) + len(self._numbers) * NAME_BYTES
            self._map[start : start + NAME_BYTES] = name.encode()[:NAME_BYTES].ljust(NAME_BYTES, b"\0")
            self._numbers[name] = len(self._numbers) + 1
        return self._numbers[name]

    def close(self) -> None:
        """The process ends in good order: remove the file. Native calls may still be running in other threads."""
        self.file.unlink(missing_ok=True)

    def abandon(self) -> None:
        """Leave the file to the parent: called in a forked child, where it is still the parent's.

        The lock belongs to the open file, which both processes hold; closing ours does not end it.
        """
        with contextlib.suppress(BufferError):  # a decision of the parent's time may still refer to the slots
            self.slots.release()
            self._map.close()
        self._file.close()


@dataclass(frozen=True, slots=True)
class Wreck:
    """The file of a process that is gone, and what it was running."""

    file: Path
    culprits: tuple[Culprit, ...]

    def remove(self) -> None:
        """Remove the file, after what it says is kept elsewhere."""
        self.file.unlink(missing_ok=True)


def wrecks(folder: Path) -> list[Wreck]:
    """The files that processes which are gone have left in a folder. Damaged ones name nobody."""
    found = []
    for file in sorted(folder.glob(f"*{SUFFIX}")):
        with contextlib.suppress(FileNotFoundError, BlockingIOError), file.open("rb") as opened:
            _lock(opened)
            found.append(Wreck(file, _culprits(opened.read(FILE_BYTES + 1), file.name.partition("-")[0])))
    return found


def _culprits(content: bytes, process: str) -> tuple[Culprit, ...]:
    if len(content) != FILE_BYTES or not content.startswith(MAGIC):
        return ()
    running = sorted({number for number in memoryview(content)[FIRST_SLOT:].cast("Q") if 0 < number <= NAMES})
    culprits = []
    for number in running:
        start = len(MAGIC) + (number - 1) * NAME_BYTES
        name = content[start : start + NAME_BYTES].rstrip(b"\0").decode(errors="replace")
        path, _, build = name.partition(" ")
        if path and build:
            culprits.append(Culprit(path, build, process))
    return tuple(culprits)


def _lock(file: IO[bytes]) -> None:
    """Take the lock of a file, or raise BlockingIOError when a process that lives holds it."""
    import fcntl  # noqa: PLC0415 (POSIX only; without it there is no compiler either, so no kernel to record)

    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
