"""The core of a router in Mojo: the kernel `router`, and the hot path that says which core a new router gets.

A call through ctypes would take longer than the queue itself. The kernel's functions are therefore made into built-in
functions of the interpreter, with `PyCFunction_NewEx` of its C API: such a call takes 30 ns.

Which core answers is decided in the background from a process' first router on, and a router keeps the core that it was
opened with. Who wants the kernel from the start waits for `synapse.hotpath.ready("router")` before.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from typing import Any, cast

import numpy as np

from synapse.callosum.message import LANES, Message
from synapse.callosum.router.drill import Transcript, drill, examples
from synapse.callosum.router.reference import ReferenceCore
from synapse.callosum.router.state import Core, Hooks
from synapse.errors import Unavailable
from synapse.hotpath.paths import hotpath
from synapse.hotpath.rollout.plan import Plan, Stage
from synapse.kernels.cache import found_build
from synapse.kernels.checks import load_found
from synapse.kernels.native import FoundBuild, NativeSide
from synapse.kernels.spec import KernelSpec

PATH = "router"
PLAN: Plan = (Stage("full", share=1.0, compare=0.01, dwell=timedelta(days=30), min_samples=0),)
"""A build that has agreed in its burn-in makes the core of every router; one in a hundred is drilled first."""

NOARGS, ONE = 0x4, 0x8
"""METH_NOARGS and METH_O of the C API."""
FUNCTIONS = {"put": ONE, "take": NOARGS, "put_many": ONE, "take_many": ONE, "heads": NOARGS, "clear": NOARGS}

ROOM, CHORES, WAITING = 1, 5, 6
HEADS, COUNTS = 16, 16 + LANES
"""Where in a state's numbers these are; its first sixteen are the `State` of router.mojo."""


class _Definition(ctypes.Structure):
    """PyMethodDef of the C API."""

    _fields_ = [
        ("name", ctypes.c_char_p),
        ("function", ctypes.c_void_p),
        ("flags", ctypes.c_int),
        ("doc", ctypes.c_char_p),
    ]


class _Memory(int):
    """The address of a state, which the built-in functions are bound to: it lives as long as any of them."""

    def __new__(cls, capacity: int, share: int, hooks: Hooks, clear: Callable[[_Memory], Any]) -> _Memory:
        numbers = np.zeros(HEADS + 2 * LANES, np.int64)
        slots = np.zeros(LANES * capacity, np.int64)  # memory that is never written is never used
        address: int = numbers.__array_interface__["data"][0]
        memory = super().__new__(cls, address)
        memory.clear = clear
        calls = (hooks.refused, hooks.nothing, hooks.arrived, hooks.given)
        numbers[:HEADS] = (
            *(capacity, capacity, share, 0, 0, 0, 0, address + 8 * HEADS, address + 8 * COUNTS),
            *(slots.__array_interface__["data"][0], id(_LANE), id(None), *map(id, calls)),
        )
        memory.numbers = numbers.data
        memory.kept = (slots, calls)
        return memory

    numbers: memoryview[int]
    kept: object
    clear: Callable[[_Memory], Callable[[], object]]

    def __del__(self) -> None:
        self.clear(self)()


_LANE = sys.intern("lane")


class NativeCore:
    """See `synapse.callosum.router.state.Core`."""

    __slots__ = ("_numbers", "heads", "put", "put_many", "take", "take_many")

    def __init__(self, library: ctypes.CDLL, capacity: int, share: int, hooks: Hooks) -> None:
        functions = _functions(library)
        memory = _Memory(capacity, share, hooks, functions["clear"])
        self._numbers = memory.numbers
        self.put: Callable[[Message], None] = functions["put"](memory)
        self.take: Callable[[], Message] = functions["take"](memory)
        self.put_many: Callable[[list[Message]], int] = functions["put_many"](memory)
        self.take_many: Callable[[int], list[Message]] = functions["take_many"](memory)
        self.heads: Callable[[], list[Message]] = functions["heads"](memory)

    @property
    def room(self) -> int:
        """Messages that a lane may hold now."""
        return self._numbers[ROOM]

    @room.setter
    def room(self, room: int) -> None:
        self._numbers[ROOM] = room

    @property
    def chores(self) -> int:
        """As in `Core`."""
        return self._numbers[CHORES]

    @chores.setter
    def chores(self, chores: int) -> None:
        self._numbers[CHORES] = chores

    @property
    def waiting(self) -> int:
        """As in `Core`."""
        return self._numbers[WAITING]

    @waiting.setter
    def waiting(self, waiting: int) -> None:
        self._numbers[WAITING] = waiting

    def depths(self) -> list[int]:
        """Messages in each of the 20 lanes."""
        return self._numbers[COUNTS : COUNTS + LANES].tolist()

    def __reduce__(self) -> tuple[type[Transcript], tuple[Transcript]]:
        """What another process gets of it is what it does in a drill."""
        return tuple, (drill(self),)


@cache
def _functions(library: ctypes.CDLL) -> dict[str, Callable[[_Memory], Any]]:
    """For each function of the kernel, what makes a built-in function of it that is bound to a state."""
    interpreter = ctypes.PyDLL(None)
    return {name: _maker(interpreter, library, name, flags) for name, flags in FUNCTIONS.items()}


def _maker(interpreter: ctypes.PyDLL, library: ctypes.CDLL, name: str, flags: int) -> Callable[[_Memory], Any]:
    make = interpreter["PyCFunction_NewEx"]
    make.restype, make.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.py_object, ctypes.c_void_p]
    function = ctypes.cast(library[f"router_{name}"], ctypes.c_void_p)
    definition = _Definition(name.encode(), function, flags, None)  # must live as long as what is made of it
    _definitions.append(definition)
    return lambda memory: make(ctypes.addressof(definition), memory, None)


_definitions: list[_Definition] = []


def open_native(library: ctypes.CDLL, capacity: int, share: int, hooks: Hooks) -> NativeCore:
    """The kernel's core."""
    return NativeCore(library, capacity, share, hooks)


def self_test(library: ctypes.CDLL) -> None:
    """Compare the kernel's cores with the reference.

    Raises:
        AssertionError: one does something else.
    """
    for call in examples():
        if not agrees(open_native(library, *call), ReferenceCore(*call)):
            raise AssertionError(f"another order than the reference with capacity {call[0]} and share {call[1]}")


def agrees(answer: Core, expected: Core) -> bool:
    """Whether two empty cores do the same. They are empty again afterwards."""
    return _transcript(answer) == _transcript(expected)


def _transcript(core: Any) -> Transcript:
    """What a core does in a drill; what came from another process is that already."""
    return cast(Transcript, core) if isinstance(core, tuple) else drill(core)


def find() -> FoundBuild:
    """The build of this machine.

    Raises:
        NotFound: there is none.
        Unavailable: this interpreter cannot use one.
    """
    if sys.implementation.name != "cpython" or not getattr(sys, "_is_gil_enabled", lambda: True)():
        raise Unavailable("the kernel router is for CPython with its global lock")
    return found_build(KERNEL)


def bind(path: Path) -> Any:
    """What opens the kernel's cores.

    Raises:
        KernelRefused, Unavailable: it does not pass its checks, or they could not be made.
    """
    return partial(open_native, load_found(KERNEL, path))


KERNEL = KernelSpec(
    name="router",
    source=Path(__file__).with_name("router.mojo"),
    symbols=("router_abi_version", "router_cpu_features", *(f"router_{name}" for name in FUNCTIONS)),
    abi_version=1,
    self_test=self_test,
)


@hotpath(PATH, kernel=NativeSide(find, bind), agrees=agrees, plan=PLAN, burn_in=examples)
def open_core(capacity: int, share: int, hooks: Hooks) -> Core:
    """An empty core: which one it is, is decided once for each router, since the two keep their messages differently.

    Args:
        capacity: messages that each lane holds at most.
        share: external messages that go before an internal one that waits.
    """
    return ReferenceCore(capacity, share, hooks)
