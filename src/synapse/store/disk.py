"""Why a file of SQLite cannot be written: it says that it cannot, and often of a full disk only "disk I/O error"."""

from __future__ import annotations

import os
from pathlib import Path

SHARED_MEMORY_BYTES = 2**15
"""What SQLite needs beside a database even to read it: the index of its write-ahead log, in pieces of this size."""


def cannot_write(path: Path) -> tuple[str, str] | None:
    """What stands in the way of writing this file, and what to do about it; None when nothing is seen."""
    try:
        disk = os.statvfs(path.parent)
    except OSError as error:
        return f"{path.parent} cannot be looked at ({error.strerror})", "set SYNAPSE_HOME to a folder that is there"
    if disk.f_flag & os.ST_RDONLY:
        return "its disk is mounted read-only", "mount it for writing, or set SYNAPSE_HOME to another folder"
    for place in (path.parent, path):
        if place.exists() and not os.access(place, os.W_OK):
            return f"you may not write {place}", "change its permissions, or set SYNAPSE_HOME to another folder"
    return None


def is_full(path: Path) -> bool:
    """Whether the disk of this file has no room for what SQLite needs at the least."""
    try:
        disk = os.statvfs(path.parent)
    except OSError:
        return False
    return disk.f_bavail * disk.f_frsize < SHARED_MEMORY_BYTES
