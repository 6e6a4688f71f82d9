"""The compiled core of the router, kept between runs, and routers with a core of one's choice."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache, partial

import pytest

from support.pattern_kernel import kernel_build
from synapse.callosum.router_native import KERNEL, open_native
from synapse.callosum.router_reference import ReferenceCore
from synapse.callosum.router_state import Core, Hooks
from synapse.hotpath.compiler import CompilerMissing
from synapse.hotpath.kernel_checks import load_build
from synapse.hotpath.kernel_spec import KernelBuild

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
