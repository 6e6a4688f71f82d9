"""Real kernels that behave and misbehave, compiled for the tests, and the reference they stand beside."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from synapse.errors import InvalidInput
from synapse.hotpath import FoundBuild, NativeSide

SOURCE = r"""
#include <stdint.h>
#include <unistd.h>
#ifndef WRONG_EVERY
#define WRONG_EVERY 0
#endif
#ifndef RAISES_OF_100
#define RAISES_OF_100 0
#endif
#ifndef SLOW_LOOPS
#define SLOW_LOOPS 0
#endif
#define CRASH_ON -666
#define HANG_ON -777
#define RAISE_ON -888

static int64_t calls = 0;

int total(const int64_t *values, int64_t count, int64_t *answer) {
    calls++;
    if (count > 0 && values[0] == CRASH_ON) *(volatile int *)0 = 1;
    if (count > 0 && values[0] == HANG_ON) for (;;) sleep(1);
    if (count > 0 && values[0] == RAISE_ON) return 1;
    if (calls % 100 < RAISES_OF_100) return 1;
    int64_t sum = 0;
    for (volatile int64_t i = 0; i < SLOW_LOOPS; i++) {}
    for (int64_t i = 0; i < count; i++) sum += values[i];
    if (WRONG_EVERY && calls % WRONG_EVERY == 0) sum++;
    *answer = sum;
    return 0;
}
"""
CRASH, HANG, RAISE = -666, -777, -888
"""First values that bring the kernel down, hang it, or make it fail."""


def values(*numbers: int) -> NDArray[np.int64]:
    """An argument of `total`."""
    return np.array(numbers, np.int64)


def total(numbers: NDArray[np.int64]) -> int:
    """The reference. Refuses an empty array."""
    if not len(numbers):
        raise InvalidInput("the sum of nothing is not defined here")
    answer = 0
    for number in numbers.tolist():
        answer += number
    return answer


def same(one: int, other: int) -> bool:
    """When two answers of `total` agree."""
    return one == other


def bind_total(library: Path) -> Callable[[NDArray[np.int64]], int]:
    """The kernel of a compiled library."""
    function = ctypes.CDLL(str(library)).total
    function.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p)

    def call(numbers: NDArray[np.int64]) -> int:
        answer = ctypes.c_int64()
        if function(numbers.ctypes.data, len(numbers), ctypes.byref(answer)):
            raise RuntimeError("the kernel failed")
        return answer.value

    return call


def bind_noting(library: Path) -> Callable[[NDArray[np.int64]], int]:
    """The same, and a line for the process that opens it in a file beside the library."""
    with library.with_suffix(".opened").open("a") as log:
        log.write(f"{os.getpid()}\n")
    return bind_total(library)


def bind_dies(library: Path) -> Callable[[NDArray[np.int64]], int]:
    """A library that brings its process down when it is opened."""
    ctypes.string_at(0)
    raise AssertionError("not reached")


def bind_refuses(library: Path) -> Callable[[NDArray[np.int64]], int]:
    """A library that lacks what is asked of it."""
    raise OSError("undefined symbol: total")


def compile_kernel(folder: Path, **behaviour: int) -> NativeSide:
    """Build the kernel with some behaviour: WRONG_EVERY, RAISES_OF_100, SLOW_LOOPS."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("there is no C compiler (cc, gcc or clang) to build the misbehaving kernels with")
    flags = [f"-D{name}={value}" for name, value in sorted(behaviour.items())]
    name = hashlib.sha256(" ".join(flags).encode()).hexdigest()[:12]
    source, library = folder / f"{name}.c", folder / f"{name}.so"
    if not library.exists():
        source.write_text(SOURCE)
        subprocess.run([compiler, "-O1", "-shared", "-fPIC", *flags, str(source), "-o", str(library)], check=True)
    build = FoundBuild(name, library)
    return NativeSide(lambda: build, bind_total)
