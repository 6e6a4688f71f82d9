"""What a shared library says about itself: class, machine, symbols, and which others it needs.

It is read without loading it, since loading a damaged library can kill the process. Format: System V ABI, chapters 4
and 5 (64-bit).
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
_TAG = struct.Struct("<qQ")
_SHARED_OBJECT = 3
_LOAD = 1
_DYNAMIC = 6
_DYNAMIC_SYMBOLS = 11
_NEEDED = 1
_LARGEST = 2**28


@dataclass(frozen=True, slots=True)
class SharedLibrary:
    """A 64-bit little-endian ELF shared library."""

    machine: int
    symbols: frozenset[str]
    """The symbols it defines for others."""
    needed: tuple[str, ...]
    """The libraries that the loader must find with it (DT_NEEDED)."""


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
    needed: list[str] = []
    for _, section_kind, _, _, offset, size, link, *_ in headers:
        if section_kind not in (_DYNAMIC, _DYNAMIC_SYMBOLS):
            continue
        names, names_size = headers[link][4:6]
        table = content[names : names + names_size]
        if section_kind == _DYNAMIC:
            tags = (_TAG.unpack_from(content, at) for at in range(offset, offset + size, _TAG.size))
            needed += [_name(table, value) for tag, value in tags if tag == _NEEDED]
            continue
        for at in range(offset, offset + size, _SYMBOL.size):
            name, _, _, section, _, _ = _SYMBOL.unpack_from(content, at)
            if section:
                symbols.add(_name(table, name))
    return SharedLibrary(machine, frozenset(symbols), tuple(needed))


def _name(table: bytes, at: int) -> str:
    return table[at : table.index(b"\0", at)].decode("utf-8")


def _refused(path: Path, reason: str) -> Corrupt:
    return Corrupt(f"{path} is not a kernel library: {reason}", hint="build it anew with `synapse kernels build`")
