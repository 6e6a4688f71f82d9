"""The native side of a hot path: where its build is found, and how a function is made of it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class FoundBuild:
    """A build of a kernel that has been checked. `id` changes whenever the code or the CPU it is made for does."""

    id: str
    library: Path


@dataclass(frozen=True, slots=True)
class NativeSide:
    """What takes the reference's place.

    Attributes:
        find: the build for this machine; raises a `SynapseError` that says why there is none.
        bind: opens a library and returns a function with the reference's signature. It must be a function at the top
            level of a module, since the burn-in calls it in another process. It may raise.
    """

    find: Callable[[], FoundBuild]
    bind: Callable[[Path], Callable[..., Any]]


def python_forced() -> bool:
    """Whether `SYNAPSE_FORCE_PYTHON` turns all native code off."""
    return os.environ.get("SYNAPSE_FORCE_PYTHON", "").strip().lower() not in ("", "0", "false", "no", "off")
