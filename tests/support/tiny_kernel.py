"""A kernel of one function: as a room other than `hotpath` would ship it, and as C that misbehaves in some way."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from synapse.kernels.cache import KernelBuild, KernelSpec
from synapse.kernels.checks import seal

LOG = "TINY_SELF_TESTS"
"""Environment variable with the file in which every self-test notes the process that it runs in."""

C_SOURCE = r"""
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#ifndef AT_LOAD
#define AT_LOAD
#endif
#ifndef AT_CALL
#define AT_CALL
#endif
__attribute__((constructor)) static void load(void) { AT_LOAD; }
int64_t tiny_abi_version(void) { return 1; }
int64_t tiny_double(int64_t number) { AT_CALL; return 2 * number; }
#ifdef FEATURES
int64_t tiny_cpu_features(void) { return FEATURES; }
#endif
"""


def declare(library: ctypes.CDLL) -> None:
    """Numbers that do not fit in an `int`."""
    library.tiny_double.argtypes = (ctypes.c_int64,)
    library.tiny_double.restype = ctypes.c_int64


def doubles(library: ctypes.CDLL) -> None:
    """The self-test."""
    if LOG in os.environ:
        with Path(os.environ[LOG]).open("a") as log:
            log.write(f"{os.getpid()}\n")
    answer = library.tiny_double(21)
    if answer != 42:
        raise AssertionError(f"twice 21 is 42, not {answer}")


def dies(library: ctypes.CDLL) -> None:
    """A self-test in which the library brings the process down."""
    ctypes.string_at(0)


KERNEL = KernelSpec(
    name="tiny",
    source=Path(__file__).with_name("tiny.mojo"),
    symbols=("tiny_abi_version", "tiny_double"),
    abi_version=1,
    self_test=doubles,
    declare=declare,
)


def compile_tiny(folder: Path, *link: str, **macros: str) -> KernelBuild:
    """A library as `build_kernel` leaves one in its cache, of C that does AT_LOAD, AT_CALL or asks for FEATURES.

    Args:
        link: further arguments of the linker.
    """
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("there is no C compiler (cc, gcc or clang) to build the misbehaving kernels with")
    flags = [f"-D{name}={value}" for name, value in sorted(macros.items())]
    name = hashlib.sha256(" ".join(flags).encode()).hexdigest()[:12]
    source, library = folder / f"{name}.c", folder / f"tiny-{name}.so"
    source.write_text(C_SOURCE)
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", *flags, str(source), "-o", str(library), *link], check=True)
    seal(library)
    return KernelBuild("tiny", name, library)
