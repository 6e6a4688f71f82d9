"""The sha256 of a model file, which names its packed form, without reading the file each time."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from synapse.errors import NotFound
from synapse.log import Logger
from synapse.models.pulling.transfer import sha256_of
from synapse.models.record import RECORD, Record

log = Logger(__name__)

SHA256 = r"^[0-9a-f]{64}$"


class _Seen(BaseModel):
    """What a file looked like when its sha256 was computed."""

    model_config = ConfigDict(strict=True, extra="forbid")

    path: str
    size: int
    mtime_ns: int
    sha256: str = Field(pattern=SHA256)


def source_sha256(path: Path, folder: Path) -> str:
    """The sha256 of a GGUF file, in hexadecimal. A file whose sha256 is not known is read, and the result noted.

    Raises:
        NotFound: the file cannot be read.
    """
    path = path.absolute()
    known = known_sha256(path, folder)
    if known is not None:
        return known
    try:
        before = path.stat()
        sha256 = sha256_of(path)
        after = path.stat()
    except OSError as error:
        raise _unreadable(path, error) from error
    if _look(path, before) == _look(path, after):  # otherwise somebody is writing it at this moment
        seen = _Seen(path=str(path), size=after.st_size, mtime_ns=after.st_mtime_ns, sha256=sha256)
        _write(_note(path, folder), seen)
    return sha256


def known_sha256(path: Path, folder: Path) -> str | None:
    """The sha256 of a GGUF file, without reading the file; None when it is not known.

    It is taken from the file's record in the library, or from what was noted in `folder` when the same path had the
    same size and time of change.

    Raises:
        NotFound: there is no such file.
    """
    path = path.absolute()
    try:
        stat = path.stat()
    except OSError as error:
        raise _unreadable(path, error) from error
    recorded = _recorded(path, stat)
    if recorded is not None:
        return recorded
    seen = _noted(_note(path, folder))
    return seen.sha256 if seen is not None and (seen.path, seen.size, seen.mtime_ns) == _look(path, stat) else None


def _unreadable(path: Path, error: OSError) -> NotFound:
    return NotFound(f"cannot read the model file {path}: {error.strerror}")


def _note(path: Path, folder: Path) -> Path:
    return folder / "sources" / f"{hashlib.sha256(os.fsencode(path)).hexdigest()}.json"


def _look(path: Path, stat: os.stat_result) -> tuple[str, int, int]:
    return str(path), stat.st_size, stat.st_mtime_ns


def _recorded(path: Path, stat: os.stat_result) -> str | None:
    """What the library wrote down when it pulled the file, unless the file was changed since."""
    record = path.parent / RECORD
    try:
        if record.stat().st_mtime_ns < stat.st_mtime_ns:
            return None
        files = Record.model_validate_json(record.read_bytes()).files
    except (OSError, ValidationError):
        return None
    found = [file.sha256 for file in files if (file.name, file.size) == (path.name, stat.st_size)]
    return found[0] if found and re.match(SHA256, found[0]) else None


def _noted(note: Path) -> _Seen | None:
    try:
        return _Seen.model_validate_json(note.read_bytes())
    except (OSError, ValidationError):
        return None


def _write(note: Path, seen: _Seen) -> None:
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=note.parent, prefix=f".{note.stem}-")
        try:
            with os.fdopen(descriptor, "w") as out:
                out.write(seen.model_dump_json())
            Path(name).replace(note)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:  # the file will be read again next time, which is no reason not to start
        log.warning("the sha256 of a model file could not be noted", file=str(note), reason=error.strerror)
