"""What a shared library says about itself: class, machine and exported symbols, read from the file without loading it.

Loading a damaged library can kill the process, so this comes first. Format: System V ABI, chapters 4 and 5 (64-bit).
"""

from __future__ import annotations

import platform
import struct
from dataclasses import dataclass
from pathlib import Path

from synapse.errors import Corrupt

MACHINES = {"x86_64": 62, "aarch64": 183, "riscv64": 243}
"""`e_machine` by the name that `platform.machine()` uses."""

_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_SEGMENT = struct.Struct("<IIQQQQQQ")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")
_SHARED_OBJECT = 3
_LOAD = 1
_DYNAMIC_SYMBOLS = 11
_LARGEST = 2**28


@dataclass(frozen=True, slots=True)
class SharedLibrary:
    """A 64-bit little-endian ELF shared library."""

    machine: int
    symbols: frozenset[str]
    """The symbols it defines for others."""


def read_library(path: Path) -> SharedLibrary:
    """Read the headers and the dynamic symbols.

    Raises:
        Corrupt: it cannot be read, is not a 64-bit little-endian ELF shared library, or is cut short.
    """
    try:
        if path.stat().st_size > _LARGEST:
            raise _refused(path, "it is larger than any kernel")
        content = path.read_bytes()
    except OSError as error:
        raise _refused(path, f"it cannot be read: {error.strerror}") from error
    try:
        return _parse(path, content)
    except (struct.error, IndexError, ValueError, OverflowError) as error:
        raise _refused(path, "its headers point outside the file: it was cut short or altered") from error


def expected_machine() -> int:
    """`e_machine` of this machine; 0, which no library has, for one without an entry in `MACHINES`."""
    return MACHINES.get(platform.machine(), 0)


def _parse(path: Path, content: bytes) -> SharedLibrary:
    if content[:4] != b"\x7fELF":
        raise _refused(path, "it is not an ELF file")
    (
        ident,
        kind,
        machine,
        _,
        _,
        segments,
        sections,
        _,
        _,
        segment_size,
        segment_count,
        section_size,
        section_count,
        _,
    ) = _HEADER.unpack_from(content)
    if ident[4:6] != b"\x02\x01":
        raise _refused(path, "it is not 64-bit little-endian ELF")
    if kind != _SHARED_OBJECT:
        raise _refused(path, f"it is not a shared library (ELF type {kind})")
    for index in range(segment_count):
        entry = _SEGMENT.unpack_from(content, segments + index * segment_size)
        if entry[0] == _LOAD and entry[2] + entry[5] > len(content):
            raise _refused(path, "it is cut short: a segment ends behind the end of the file")
    headers = [_SECTION.unpack_from(content, sections + index * section_size) for index in range(section_count)]
    symbols: set[str] = set()
    for _, section_kind, _, _, offset, size, link, *_ in headers:
        if section_kind == _DYNAMIC_SYMBOLS:
            names, names_size = headers[link][4:6]
            table = content[names : names + names_size]
            for at in range(offset, offset + size, _SYMBOL.size):
                name, _, _, section, _, _ = _SYMBOL.unpack_from(content, at)
                if section:
                    symbols.add(table[name : table.index(b"\0", name)].decode("utf-8"))
    return SharedLibrary(machine, frozenset(symbols))


def _refused(path: Path, reason: str) -> Corrupt:
    return Corrupt(f"{path} is not a kernel library: {reason}", hint="build it anew with `synapse kernels build`")
