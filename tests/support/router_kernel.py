"""The compiled core of the router, kept between runs, and routers with a core of one's choice."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache, partial

import pytest

from support.pattern_kernel import kernel_build
from synapse.callosum.router.native import KERNEL, open_native
from synapse.callosum.router.reference import ReferenceCore
from synapse.callosum.router.state import Core, Hooks
from synapse.kernels.checks import load_build
from synapse.kernels.compiler import CompilerMissing
from synapse.kernels.spec import KernelBuild

CORES = ("reference", "native")


def router_build() -> KernelBuild:
    """The kernel, compiled by the first run that needs it."""
    try:
        return kernel_build(KERNEL)
    except CompilerMissing as error:
        pytest.skip(error.message)


@cache
def router_library() -> ctypes.CDLL:
    """The kernel, opened in this process without a hot path."""
    build = router_build()
    return load_build(KERNEL, build, build.path.parent)


def core_opener(name: str) -> Callable[[int, int, Hooks], Core]:
    """What opens the core called ``reference`` or ``native``."""
    return ReferenceCore if name == "reference" else partial(open_native, router_library())
