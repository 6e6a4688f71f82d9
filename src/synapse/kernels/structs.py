"""How a kernel is handed many values at once: a `ctypes.Structure`, whose size the kernel confirms.

A kernel that takes structures names them in its `KernelSpec` and exports `<name>_struct_size(number)`: the size of the
one with that number, as its own code has it. So fields that were added on one side only are found when a library is
opened, not when it writes where it should not.
"""

from __future__ import annotations

import ctypes
from typing import Any

from numpy.typing import NDArray

Field = tuple[str, type[ctypes.c_int64]]


def words(names: str) -> list[Field]:
    """Fields of eight bytes each: whole numbers, and addresses."""
    return [(name, ctypes.c_int64) for name in names.split()]


def address(array: NDArray[Any]) -> int:
    """Where an array's first element is. The array must outlive its use."""
    pointer: int = array.__array_interface__["data"][0]  # a third of the time that array.ctypes.data takes
    return pointer


def wrong_size(library: ctypes.CDLL, kernel: str, structs: tuple[type[ctypes.Structure], ...]) -> str:
    """Which of a kernel's structures has another size in the library; empty when none has."""
    if not structs:
        return ""
    size = library[f"{kernel}_struct_size"]
    size.restype, size.argtypes = ctypes.c_int64, [ctypes.c_int64]
    for number, struct in enumerate(structs):
        if (found := size(number)) != ctypes.sizeof(struct):
            return f"its {struct.__name__} has {found} bytes, and this Synapse's {ctypes.sizeof(struct)}"
    return ""
