"""Moving bytes: copying with progress and cancellation, checking what arrived, and saying what went wrong."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from synapse.commands import Progress
from synapse.errors import Unavailable
from synapse.models.errors import ModelFileCorrupt

CHUNK = 2**20
# A full disk, a full quota, and a file larger than this process or file system allows.
NO_SPACE = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EFBIG))


class DiskFull(Unavailable):
    """There is no room for the file; what had been written of it is gone."""

    code = "disk_full"


class Cancelled(Exception):
    """Whoever asked for the transfer has gone."""


class Transfer:
    """One pull: tells whoever waits how far it is, and stops when told to.

    Attributes:
        action: what is being done at the moment.
    """

    def __init__(self, name: str, progress: Progress) -> None:
        self.action = "fetching"
        self._name = name
        self._progress = progress
        self._stopped = threading.Event()

    def stop(self) -> None:
        """Make the next `report` raise; callable from any thread."""
        self._stopped.set()

    def report(self, done: int, total: int | None) -> None:
        """Tell the listener.

        Raises:
            Cancelled: `stop` was called.
        """
        self.check()
        self._progress(f"{self.action} {self._name}", done, total)

    def check(self) -> None:
        """Raises `Cancelled` when `stop` was called."""
        if self._stopped.is_set():
            raise Cancelled


def copy_stream(source: BinaryIO, target: Path, size: int, transfer: Transfer) -> None:
    """Write exactly `size` bytes of `source` to `target`, onto the disk.

    Raises:
        ModelFileCorrupt: the source holds fewer or more.
    """
    done = 0
    with target.open("wb") as out:
        while chunk := source.read(min(CHUNK, size - done + 1)):
            done += len(chunk)
            if done > size:
                break
            out.write(chunk)
            transfer.report(done, size)
        flush(out)
    if done != size:
        raise ModelFileCorrupt(f"{target.name} must have {size} bytes, but {'more' if done > size else done} arrived")


def flush(file: BinaryIO) -> None:
    """Onto the disk, so that a rename after it cannot outlive the bytes."""
    file.flush()
    os.fsync(file.fileno())


def sha256_of(path: Path, transfer: Transfer | None = None) -> str:
    """The file's sha256 in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            if transfer is not None:
                transfer.check()
    return digest.hexdigest()


def check_file(path: Path, what: str, size: int, sha256: str, transfer: Transfer | None = None) -> None:
    """Raises `ModelFileCorrupt` when the file is not the one with this size and sha256."""
    hint = "the source may have been altered, or the connection is unreliable; pull again"
    found = path.stat().st_size
    if found != size:
        raise ModelFileCorrupt(f"{what} must have {size} bytes, but has {found}", hint=hint)
    digest = sha256_of(path, transfer)
    if digest != sha256:
        raise ModelFileCorrupt(f"{what} must have the sha256 {sha256}, but has {digest}", hint=hint)


def check_room(folder: Path, needed: int) -> None:
    """Raises `DiskFull` when the folder's disk has less than `needed` bytes left."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DiskFull(f"{_megabytes(needed)} are needed in {folder}, but only {_megabytes(free)} are free", hint=_HINT)


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turns the operating system's errors about writing below `folder` into errors with a hint."""
    try:
        yield
    except OSError as error:
        if error.errno in NO_SPACE:
            raise DiskFull(f"the disk of {folder} is full", hint=_HINT) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise Unavailable(
                f"{error.filename or folder} cannot be read or written: {error.strerror}",
                hint="mend its permissions, or set SYNAPSE_HOME to a folder you can write to",
            ) from error
        raise


_HINT = "make room, or set SYNAPSE_HOME to a folder on a larger disk; then pull again"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.0f} MB"
