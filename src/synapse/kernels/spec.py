"""What a kernel is, and a library that was built from it."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class KernelSpec:
    """A kernel that ships with Synapse. Its functions are importable by module and name: a child process calls them."""

    name: str
    source: Path
    """What is compiled; files it imports are beside it, and their names begin with its own."""
    symbols: tuple[str, ...]
    """What the library must export, `<name>_abi_version` among it. One that exports `<name>_cpu_features` too is
    refused on a CPU that lacks a feature of the mask which that returns (`synapse.kernels.cpu.FEATURES`)."""
    abi_version: int
    self_test: Callable[[ctypes.CDLL], None]
    """Calls the library on small examples and raises on a wrong answer. It runs in a process of its own, once for each
    library, so it must not be what prepares the library for others: that is `declare`."""
    declare: Callable[[ctypes.CDLL], None] | None = None
    """Tells ctypes the types of arguments and results, each time the library is opened."""
    structs: tuple[type[ctypes.Structure], ...] = ()
    """What its functions are handed; the kernel confirms their sizes (`synapse.kernels.structs`)."""
    main: Path | None = None
    """A Mojo source that exports `<name>_main(argc, argv)`, for a kernel that can be a program of its own."""


@dataclass(frozen=True)
class KernelBuild:
    """A library on disk, not yet checked."""

    name: str
    build_id: str
    """Hexadecimal sha256 over source, compiler, CPU and flags; of the file itself for a prebuilt one."""
    path: Path
