"""The flight recorder: which kernel each thread of a process is running, kept where a crash cannot lose it.

One small memory-mapped file a process. Before a native call a thread writes the number of the build into its slot, and
0 after it: two stores of eight bytes. The pages are the operating system's, so they outlive the process. The process
holds a lock on its file for as long as it lives; a file that nobody holds is of a process that is gone, and what its
slots name was running when it died. (A lock cannot be mistaken the way a process number can, which is used again.)
A signal that the process brought upon itself is noted in it too: see `synapse.kernels.fatal_signals`.

The space of the file is allocated before it is mapped. Where there is none, the slots are in memory only.

Format: the magic, the `NOTE` of the fatal signal, 64 names of builds of 256 bytes each (UTF-8, zero-padded: path, a
space, build), then `SLOTS` integers of eight bytes.
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
from synapse.kernels.fatal_signals import NOTE, SENT, SIGNALS, address_of, guard, note_deaths_at

MAGIC = b"SYNFLT02"
NAMES = 64
NAME_BYTES = 256
FIRST_NAME = len(MAGIC) + NOTE.size
FIRST_SLOT = FIRST_NAME + NAMES * NAME_BYTES
FILE_BYTES = FIRST_SLOT + 8 * SLOTS
SUFFIX = ".flight"


@dataclass(frozen=True, slots=True)
class Running:
    """A build that was running in a process when it died."""

    path: str
    build: str


class FlightRecorder:
    """The file of this process. `slots[i]` is 0, or the number of the build that the thread with slot i is running.

    Attributes:
        problem: why nothing is kept beyond the process; empty when it is.
    """

    def __init__(self, folder: Path) -> None:
        """Open a new file in a folder that exists, or keep the slots in memory where it cannot be made."""
        self._file: IO[bytes] | None = None
        self._problem = ""
        try:
            self._map = self._open(folder)
        except OSError as error:
            self._problem = f"no file for it can be made in {folder}: {error.strerror}"
            self._map = mmap.mmap(-1, FILE_BYTES)
        self._guarded = guard(self._map)
        note_deaths_at(address_of(self._map) + len(MAGIC))
        self.slots = memoryview(self._map)[FIRST_SLOT:].cast("Q")
        self._numbers: dict[str, int] = {}

    def _open(self, folder: Path) -> mmap.mmap:
        # Made under another name and locked first: a file that can be found is always held by its process.
        handle, name = tempfile.mkstemp(prefix=f"{os.getpid()}-", suffix=".new", dir=folder)
        self._file = os.fdopen(handle, "r+b")
        self.path = Path(name).with_suffix(SUFFIX)
        try:
            _lock(self._file)
            os.posix_fallocate(handle, 0, FILE_BYTES)  # a sparse file would fault where the disk has no room for a page
            mapping = mmap.mmap(handle, FILE_BYTES)
            mapping[: len(MAGIC)] = MAGIC
            Path(name).rename(self.path)
        except BaseException:
            self._file.close()
            self._file = None
            Path(name).unlink(missing_ok=True)
            raise
        return mapping

    @property
    def problem(self) -> str:
        """Why what is running is not kept beyond the process; empty when it is."""
        return "its file was cut short, or its disk is gone" if self._guarded.lost else self._problem

    def number_of(self, path: str, build: str) -> int:
        """The number that stands for a build in a slot, from 1.

        Raises:
            Overloaded: the file names 64 builds already.
        """
        name = f"{path} {build}"
        if name not in self._numbers:
            if len(self._numbers) == NAMES:
                raise Overloaded(f"this process has run {NAMES} builds of kernels already", hint="restart it")
            start = FIRST_NAME + len(self._numbers) * NAME_BYTES
            self._map[start : start + NAME_BYTES] = name.encode()[:NAME_BYTES].ljust(NAME_BYTES, b"\0")
            self._numbers[name] = len(self._numbers) + 1
        return self._numbers[name]

    def close(self) -> None:
        """The process ends in good order: remove the file. Native calls may still be running in other threads."""
        if self._file is not None:
            self.path.unlink(missing_ok=True)

    def abandon(self) -> None:
        """Leave the file to the parent: called in a forked child, where it is still the parent's.

        The lock belongs to the open file, which both processes hold; closing ours does not end it.
        """
        note_deaths_at(None)
        with contextlib.suppress(BufferError):  # a decision of the parent's time may still refer to the slots
            self.slots.release()
            self._map.close()
        if self._file is not None:
            self._file.close()


@dataclass(frozen=True, slots=True)
class Death:
    """What the file of a process that is gone says: what it was running, and the signal it brought upon itself.

    Attributes:
        process: its number.
        signal: SIGSEGV and its like, None when it was killed or the machine went down.
    """

    file: Path
    process: str
    running: tuple[Running, ...] = ()
    signal: int | None = None

    def remove(self) -> None:
        """Remove the file, after what it says is kept elsewhere."""
        self.file.unlink(missing_ok=True)


def deaths(folder: Path) -> list[Death]:
    """What processes that are gone have left in a folder. Damaged files name nobody."""
    found = []
    for file in sorted(folder.glob(f"*{SUFFIX}")):
        with contextlib.suppress(FileNotFoundError, BlockingIOError), file.open("rb") as opened:
            _lock(opened)
            found.append(_death(file, opened.read(FILE_BYTES + 1)))
    return found


def forgive(folder: Path, process: int) -> None:
    """Take away what a process that is gone has left: whoever watched it knows that no kernel ended it."""
    for file in folder.glob(f"{process}-*{SUFFIX}"):
        with contextlib.suppress(OSError), file.open("rb") as opened:
            _lock(opened)
            file.unlink()


def _death(file: Path, content: bytes) -> Death:
    process = file.name.partition("-")[0]
    if len(content) != FILE_BYTES or not content.startswith(MAGIC):
        return Death(file, process)
    number, origin = NOTE.unpack_from(content, len(MAGIC))
    running = sorted({number for number in memoryview(content)[FIRST_SLOT:].cast("Q") if 0 < number <= NAMES})
    builds = []
    for one in running:
        start = FIRST_NAME + (one - 1) * NAME_BYTES
        name = content[start : start + NAME_BYTES].rstrip(b"\0").decode(errors="replace")
        path, _, build = name.partition(" ")
        if path and build:
            builds.append(Running(path, build))
    return Death(file, process, tuple(builds), number if number in SIGNALS and origin not in SENT else None)


def _lock(file: IO[bytes]) -> None:
    """Take the lock of a file, or raise BlockingIOError when a process that lives holds it."""
    import fcntl  # noqa: PLC0415 (POSIX only; without it there is no compiler either, so no kernel to record)

    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
