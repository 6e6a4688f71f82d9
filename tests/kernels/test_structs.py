"""A library whose structures have another size than this Synapse's is refused before anything is handed to it."""

from __future__ import annotations

import ctypes
from dataclasses import replace

import pytest

from support.native_engine import engine_build
from synapse.engines.native.kernel import KERNEL
from synapse.engines.native.structs import STRUCTS, Step
from synapse.kernels.checks import KernelRefused, load_build


class Longer(ctypes.Structure):
    _fields_ = [("step", Step), ("more", ctypes.c_int64)]


@pytest.mark.parametrize("number", range(len(STRUCTS)))
def test_each_structure_is_confirmed_by_the_kernel(number: int) -> None:
    build = engine_build()
    structs = (*STRUCTS[:number], Longer, *STRUCTS[number + 1 :])
    with pytest.raises(KernelRefused, match=f"its Longer has {ctypes.sizeof(STRUCTS[number])} bytes"):
        load_build(replace(KERNEL, structs=structs), build, build.path.parent)
