"""The file of a pattern index: its arrays as they are in memory, to be memory-mapped, and the sha256 of each.

8 bytes     "SYNPATT1"
8 bytes     length of the header, little-endian
header      JSON: version, metric, dim, count, unit, frame_rows, sha256 of each array in the order of `_layout`
32 bytes    sha256 of everything so far
arrays      little-endian, in the order of `_layout`, each from the next multiple of 64 bytes on
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import tempfile
from dataclasses import fields
from math import prod
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from synapse.errors import Corrupt, NotFound, Unavailable
from synapse.kernels.mapped_file import MappedFile
from synapse.vectors.codes import GROUP, Codes, Frame, Metric
from synapse.vectors.scan import View

MAGIC = b"SYNPATT1"
VERSION: Literal[1] = 1
_ALIGNMENT = 64
_LONGEST_HEADER = 2**16


class IndexDamaged(Corrupt):
    """A file is not a pattern index, or not one that this version reads, or not as it was written."""

    code = "index_damaged"


class _Header(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    version: Literal[1]
    metric: Metric
    dim: int = Field(ge=1, le=4096)
    count: int = Field(ge=0, le=2**31 - 2 * GROUP)
    unit: float = Field(gt=0, allow_inf_nan=False)
    frame_rows: int = Field(ge=0)
    sha256: list[str]


def write_view(path: Path, view: View) -> None:
    """Write a view without removed rows and spare room; the file replaces an older one in one step.

    Raises:
        Unavailable: it cannot be written.
        IndexDamaged: the view's own file was cut short under it.
    """
    arrays = _arrays(view)
    header = _Header(
        version=VERSION,
        metric=view.metric,
        dim=view.vectors.shape[1],
        count=view.count,
        unit=view.frame.unit,
        frame_rows=view.frame.rows,
        sha256=[hashlib.sha256(array.data).hexdigest() for array in arrays],
    )
    check_view(view)
    encoded = header.model_dump_json().encode()
    start = MAGIC + struct.pack("<Q", len(encoded)) + encoded
    start += hashlib.sha256(start).digest()
    try:
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(start)
                for array in arrays:
                    file.write(b"\0" * (-file.tell() % _ALIGNMENT))
                    file.write(array.data if array.size else b"")
                file.flush()
                os.fsync(file.fileno())
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise Unavailable(f"the index cannot be written to {path}: {error.strerror}") from error


def read_view(path: Path) -> View:
    """Map a file and check it: form, version, size and every checksum.

    Raises:
        NotFound: there is no such file.
        IndexDamaged: it is not a pattern index, of another version, cut short or altered.
        Unavailable: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            mapped = MappedFile(file) if size else None
    except FileNotFoundError as error:
        raise NotFound(f"there is no index {path}") from error
    except OSError as error:
        raise Unavailable(f"the index {path} cannot be read: {error.strerror}") from error
    content = memoryview(mapped.memory if mapped is not None else b"")
    header, offset = _read_header(path, content)
    arrays: list[np.ndarray[Any, Any]] = []
    layout = _layout(header.count, header.dim)
    if len(header.sha256) != len(layout):
        raise _damaged(path, "its header is not complete")
    for (name, kind, shape), expected in zip(layout, header.sha256, strict=True):
        offset += -offset % _ALIGNMENT
        length = prod(shape) * np.dtype(kind).itemsize
        if offset + length > len(content):
            raise _damaged(path, "it is cut short")
        if hashlib.sha256(content[offset : offset + length]).hexdigest() != expected:
            raise _damaged(path, f"its {name} are not as they were written")
        arrays.append(np.frombuffer(content, kind, prod(shape), offset).reshape(shape))
        offset += length
    if offset != len(content):
        raise _damaged(path, "there is more in it than an index")
    ids, vectors, norms, centre, *codes = arrays
    if len(np.unique(ids)) != len(ids):
        raise _damaged(path, "an id is in it twice")
    frame = Frame(centre, header.unit, header.frame_rows)
    return View(header.metric, header.count, header.count, ids, vectors, norms, Codes(*codes), frame, None, mapped)


def check_view(view: View) -> None:
    """Refuse what was computed from a file that has been cut short under its map.

    Raises:
        IndexDamaged: it was.
    """
    if view.file is not None and view.file.lost:
        raise IndexDamaged(
            "the file of the pattern index was cut short, or its disk is gone, while it was open",
            hint="close the index, make it anew and save it again",
        )


def _read_header(path: Path, content: memoryview) -> tuple[_Header, int]:
    if content[:8] != MAGIC:
        raise _damaged(path, f"it does not begin with {MAGIC.decode()}")
    length = int.from_bytes(content[8:16], "little")
    end = 16 + length
    if len(content) < 16 or length > _LONGEST_HEADER or end + 32 > len(content):
        raise _damaged(path, "its header is cut short")
    if hashlib.sha256(content[:end]).digest() != content[end : end + 32]:
        raise _damaged(path, "its header is not as it was written")
    try:
        document = json.loads(bytes(content[16:end]))
        if isinstance(document, dict) and document.get("version") != VERSION:
            raise _damaged(path, f"its version is {document.get('version')!r}, and this Synapse reads {VERSION}")
        return _Header.model_validate(document), end + 32
    except (ValidationError, ValueError) as error:
        raise _damaged(path, "its header has another form") from error


def _layout(count: int, dim: int) -> list[tuple[str, str, tuple[int, ...]]]:
    """Name, type and shape of each array."""
    groups, lines = -(-count // GROUP), -(-dim // 8)
    rows = groups * GROUP
    planes = [("high", "u1", (groups, lines, GROUP, 4)), ("low", "u1", (rows, lines * 4))]
    numbers = [(field.name, "<f4", (rows,)) for field in fields(Codes)[len(planes) :]]
    own = [("ids", "<i8", (count,)), ("vectors", "<f4", (count, dim)), ("norms", "<f8", (count,))]
    return [*own, ("centre", "<f8", (dim,)), *planes, *numbers]


def _arrays(view: View) -> list[np.ndarray[Any, Any]]:
    codes = [getattr(view.codes, field.name) for field in fields(Codes)]
    arrays = [view.ids, view.vectors, view.norms, view.frame.centre, *codes]
    layout = _layout(view.count, view.vectors.shape[1])
    return [
        np.ascontiguousarray(array[: shape[0]], kind) for array, (_, kind, shape) in zip(arrays, layout, strict=True)
    ]


def _damaged(path: Path, reason: str) -> IndexDamaged:
    return IndexDamaged(f"{path} is not a sound pattern index: {reason}", hint="make it anew and save it again")
