"""Which processes have a model open: each holds a lock for as long as it has, and a lock ends with its process."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from synapse.models.record import RECORD

FOLDER = ".open"


def hold(folder: Path) -> Callable[[], None]:
    """Say that this process has the model in a folder open. Returns what takes that back.

    Only models of a library are noted; a file elsewhere is nobody's to remove. Where the library cannot be written,
    nothing is noted either: then it cannot be removed from there.
    """
    from filelock import FileLock, Timeout  # noqa: PLC0415 (slow to import, and most commands need no lock)

    if not (folder / RECORD).is_file():
        return _nothing
    place = _place(folder)
    try:
        place.mkdir(parents=True, exist_ok=True)
        lock = FileLock(place / f"{os.getpid()}-{secrets.token_hex(4)}")
        lock.acquire(timeout=0)
    except (OSError, Timeout):
        return _nothing

    def release() -> None:
        lock.release()
        with suppress(OSError):
            Path(lock.lock_file).unlink()

    return release


def processes(folder: Path) -> list[int]:
    """The processes that have the model in a folder open, by number. What dead ones have left is tidied up."""
    from filelock import FileLock, Timeout  # noqa: PLC0415 (as in `hold`)

    found = set()
    for path in sorted(_place(folder).glob("*-*")):
        lock = FileLock(path)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            found.add(int(path.name.partition("-")[0]))
        except OSError:
            continue
        else:
            lock.release()
            with suppress(OSError):
                path.unlink()
    return sorted(found)


def _place(folder: Path) -> Path:
    return folder.parent / FOLDER / folder.name


def _nothing() -> None:
    """What was not noted need not be taken back."""
