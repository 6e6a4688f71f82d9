"""When a signal comes that ends a process: it is noted which, and a file that was cut short does not end it.

A mapped file faults (SIGBUS) where it ends earlier than its map: somebody has cut it short, or its disk is full or
gone. And whoever finds a process dead wants to know whether it brought that upon itself (SIGSEGV, SIGBUS, SIGILL,
SIGFPE, SIGABRT) or was killed. Python runs no code in a signal's context, so the handler is machine code, for x86-64 on
Linux; elsewhere `install` says False, maps are as safe as their files, and nobody knows why a process died.

The handler uses registers, a table of its own and system calls: it may interrupt anything, in any thread. It

1. looks up the address of a SIGBUS among the maps of `guard`: there it puts zeros in place of the file, notes that the
   map is lost, and lets the thread go on,
2. writes signal and origin (`si_code`) where `note_deaths_at` says,
3. goes on with whoever handled the signal before, such as `faulthandler`; where nobody did, the signal is raised
   again with its default, so that exit status and core file are those of a process without a handler.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import struct
import sys
import threading
import weakref

SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGSEGV", "SIGBUS", "SIGILL", "SIGFPE", "SIGABRT") if hasattr(signal, name)
)
NOTE = struct.Struct("<ii")
"""What is noted of a death: the signal and its origin, which is 0 or negative where a process has sent it."""
SENT = (0, -1)
"""Origins of a signal that another process has sent: SI_USER, SI_QUEUE. (`abort` raises with SI_TKILL.)"""

PAGE = 4096
_BEFORE, _RAISE, _DEFAULT, _NOWHERE, _MAPS = 8, 264, 272, 304, 320
"""Offsets in the table, which begins with where deaths are noted: who handled each signal before, libc's `raise`, a
`struct sigaction` of zeros (SIG_DFL), room for a note that nobody reads, and the maps: start, length, lost."""
MOST_MAPS = 1000
_MAP_BYTES = 24
_TABLE_BYTES = _MAPS + MOST_MAPS * _MAP_BYTES

# handler(rdi: signal, rsi: siginfo, rdx: context); the table is PAGE bytes behind its first byte.
_LISTING = """
    f30f1efa          endbr64
    4c8d05f50f0000    lea r8, [table]
    83ff07            cmp edi, SIGBUS
    752a              jne note
    488b4610          mov rax, [rsi+16]         (the address that faulted)
    4d8d8840010000    lea r9, [r8+_MAPS]
    4d8d90005f0000    lea r10, [r8+_TABLE_BYTES]
    498b09            scan: mov rcx, [r9]
    4989c3            mov r11, rax
    4929cb            sub r11, rcx
    4d3b5908          cmp r11, [r9+8]
    723f              jb inside
    4983c118          add r9, _MAP_BYTES
    4d39d1            cmp r9, r10
    75e8              jne scan
    8b4608            note: mov eax, [rsi+8]    (its origin)
    498b08            mov rcx, [r8]
    894104            mov [rcx+4], eax
    8939              mov [rcx], edi
    89f8              mov eax, edi
    498b44c008        mov rax, [r8+_BEFORE+8*rax]
    4885c0            test rax, rax
    7402              jz default
    ffe0              jmp rax
    498db010010000    default: lea rsi, [r8+_DEFAULT]
    31d2              xor edx, edx
    41ba08000000      mov r10d, 8
    b80d000000        mov eax, rt_sigaction
    0f05              syscall
    41ffa008010000    jmp [r8+_RAISE]
    41c6411001        inside: mov byte [r9+16], 1
    56                push rsi
    4889cf            mov rdi, rcx
    498b7108          mov rsi, [r9+8]
    ba03000000        mov edx, PROT_READ|PROT_WRITE
    41ba32000000      mov r10d, MAP_PRIVATE|MAP_FIXED|MAP_ANONYMOUS
    49c7c0ffffffff    mov r8, -1
    4531c9            xor r9d, r9d
    b809000000        mov eax, mmap
    0f05              syscall
    5e                pop rsi
    4839f8            cmp rax, rdi
    740e              je done
    4c8d055a0f0000    lea r8, [table]           (no memory: it is a death after all)
    bf07000000        mov edi, SIGBUS
    eb8d              jmp note
    c3                done: ret
"""
_CODE = bytes.fromhex("".join(line.split()[0] for line in _LISTING.strip().splitlines()))


class _Action(ctypes.Structure):
    """A `struct sigaction` of glibc and musl on x86-64."""

    _fields_ = (
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_uint8 * 128),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


_SA_SIGINFO, _SA_ONSTACK = 0x4, 0x08000000
_PROT_READ, _PROT_EXEC = 1, 4
_lock = threading.Lock()
_table: int | None = None
"""Where it is, once the handler is in place."""
_keep: list[mmap.mmap] = []
"""The pages of code and table, for as long as the process lives."""
_free: list[int] = []


def install() -> bool:
    """Have the handler in place, once a process; whether it can be here."""
    global _table  # noqa: PLW0603 (one a process)
    with _lock:
        if _table is None and sys.platform == "linux" and _is_x86_64():
            try:
                _table = _place()
            except OSError:  # a system that lets nobody make code of data
                return False
            for number in SIGNALS:
                _handle(_table, number)
        return _table is not None


def note_deaths_at(address: int | None) -> None:
    """Where the handler writes a `NOTE` when the process dies; None for nowhere."""
    if install():
        assert _table is not None  # noqa: S101 (installed)
        ctypes.c_uint64.from_address(_table).value = _table + _NOWHERE if address is None else address


class Guarded:
    """A map that no longer faults, until it is closed or forgotten; see `guard`."""

    def __init__(self, row: int | None) -> None:
        self._row = row

    @property
    def lost(self) -> bool:
        """Whether the file could not be read or written where it is mapped: there are zeros in its place."""
        return self._row is not None and ctypes.c_uint8.from_address(self._row + 16).value != 0


def guard(mapping: mmap.mmap) -> Guarded:
    """Keep accesses to a map from ending the process. Ask `lost` after what was read matters.

    Where there is no handler, or there are `MOST_MAPS` maps already, it stays as it is.
    """
    address = address_of(mapping)
    if not install():
        return Guarded(None)
    with _lock:
        if not _free:
            return Guarded(None)
        row = _free.pop()
    ctypes.c_uint64.from_address(row + 16).value = 0
    ctypes.c_uint64.from_address(row).value = address
    ctypes.c_uint64.from_address(row + 8).value = -(-len(mapping) // PAGE) * PAGE  # last: from here on it counts
    weakref.finalize(mapping, _forget, row).atexit = False
    return Guarded(row)


def address_of(mapping: mmap.mmap) -> int:
    """Where a map begins in memory."""
    view = _Buffer()
    ctypes.pythonapi.PyObject_GetBuffer(ctypes.py_object(mapping), ctypes.byref(view), 0)
    address = int(view.buf or 0)
    ctypes.pythonapi.PyBuffer_Release(ctypes.byref(view))
    return address


class _Buffer(ctypes.Structure):
    """A `Py_buffer` of CPython."""

    _fields_ = (("buf", ctypes.c_void_p), ("rest", ctypes.c_void_p * 10))


def _forget(row: int) -> None:
    ctypes.c_uint64.from_address(row + 8).value = 0
    with _lock:
        _free.append(row)


def _is_x86_64() -> bool:
    return ctypes.sizeof(ctypes.c_void_p) == 8 and os.uname().machine == "x86_64"


def _place() -> int:
    """Put the code into memory that can be run, and the table behind it. Returns the table."""
    pages = mmap.mmap(-1, PAGE + _TABLE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages[: len(_CODE)] = _CODE
    start = address_of(pages)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(start), PAGE, _PROT_READ | _PROT_EXEC):
        raise OSError(ctypes.get_errno(), "memory cannot be made executable")
    _keep.append(pages)
    base = start + PAGE
    ctypes.c_uint64.from_address(base).value = base + _NOWHERE
    raiser = ctypes.cast(libc["raise"], ctypes.c_void_p).value
    ctypes.c_uint64.from_address(base + _RAISE).value = raiser or 0
    _free.extend(range(base + _MAPS, base + _TABLE_BYTES, _MAP_BYTES))
    return base


def _handle(table: int, number: int) -> None:
    """Take a signal over from whoever handles it now. One that is ignored stays ignored."""
    libc = ctypes.CDLL(None, use_errno=True)
    before = _Action()
    libc.sigaction(number, None, ctypes.byref(before))
    if before.handler == int(signal.SIG_IGN):
        return
    ctypes.c_uint64.from_address(table + _BEFORE + 8 * number).value = before.handler or 0
    action = _Action(handler=table - PAGE, flags=_SA_SIGINFO | _SA_ONSTACK)
    libc.sigaction(number, ctypes.byref(action), None)
