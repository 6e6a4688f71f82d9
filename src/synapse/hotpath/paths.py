"""The hot paths of this process: `@hotpath` declares one."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from synapse.hotpath.adapter import HotPath
from synapse.hotpath.native import NativeSide
from synapse.hotpath.rollout import STAGES, Plan

P = ParamSpec("P")
R = TypeVar("R")

PATHS: dict[str, HotPath[..., Any]] = {}
"""The hot paths of this process, by name."""


def hotpath(
    name: str,
    *,
    kernel: NativeSide,
    agrees: Callable[[R, R], bool],
    key: Callable[P, str | bytes] | None = None,
    plan: Plan = STAGES,
    burn_in: Callable[[], list[tuple[Any, ...]]] | None = None,
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Tie a reference to its kernel: ``@hotpath("pattern_search", kernel=…, agrees=…)`` above the reference.

    Args:
        name: what status, flags and the store call it.
        kernel: where its build is found and how it is opened.
        agrees: whether the kernel's answer (first) is as good as the reference's (second).
        key: from the arguments to what decides the bucket, so that one caller always gets the same side. Without it,
            calls are spread evenly.
        plan: the stages of its rollout.
        burn_in: argument tuples for the burn-in, so that it does not wait for (or copy) the calls of users.

    Returns the function that callers call, with the reference's signature.

    Raises:
        TypeError: the name is taken (found when the module is imported).
    """

    def tie(reference: Callable[P, R]) -> Callable[P, R]:
        if name in PATHS:
            raise TypeError(f"there are two hot paths called {name}")
        path = HotPath(name, reference, kernel, agrees, key=key, plan=plan, burn_in=burn_in)
        path.on_first_call = _supervise
        PATHS[name] = path
        return path.call

    return tie


_starting = threading.Lock()
"""Held from the first call of any hot path on."""


def _supervise() -> None:
    """Start the watch of this process once, in a thread: the first call does not wait for the imports of a database."""
    if _starting.acquire(blocking=False):
        threading.Thread(target=_start_watch, name="synapse-hotpath-start", daemon=True).start()


def _start_watch() -> None:
    from synapse.hotpath.watch import ensure_watched  # noqa: PLC0415 (see above)

    ensure_watched()


def _after_fork() -> None:
    global _starting  # noqa: PLW0603 (the thread stayed with the parent)
    _starting = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
