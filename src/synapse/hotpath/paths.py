"""The hot paths of this process: `@hotpath` declares one."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from synapse.errors import NotFound, TimedOut
from synapse.hotpath.call import HotPath
from synapse.hotpath.rollout.decision import UNDECIDED
from synapse.hotpath.rollout.plan import STAGES, Plan
from synapse.kernels.native import NativeSide, python_forced

if TYPE_CHECKING:
    from synapse.hotpath.rollout.watch import Watch

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


@dataclass(frozen=True, slots=True)
class Readiness:
    """Who answers a hot path in this process, as of now.

    Attributes:
        native: whether the kernel does, in this process: every call, or the share of its stage.
        why: the name of the stage, or why the reference answers.
        hint: what helps when the reference answers and that can be helped.
        final: whether it stays so until somebody does something. A store that is locked or a machine that is slow
            decides nothing: ask again later.
    """

    native: bool
    why: str
    hint: str = field(default="", compare=False)
    final: bool = True


def ready(name: str, timeout: float = 30.0) -> Readiness:
    """Wait until it is decided who answers a hot path, so that the kernel answers from the first call on if it may.

    Without this a process decides in the background from its first call on, and the reference answers meanwhile. A
    build that the store knows takes a fraction of a second, most of it imports; a new one goes through its declared
    burn-in first. All hot paths of the process are decided. It blocks: in a coroutine, use `asyncio.to_thread`.

    Args:
        timeout: seconds to wait. It goes on in the background after them, so 0 begins early what a later call awaits.

    Raises:
        NotFound: there is no such hot path in this process.
    """
    if name not in PATHS:
        raise NotFound(f"there is no hot path {name!r:.60} in this process", hint="import the module that has it")
    if python_forced():
        return standing(name)
    late = Readiness(False, f"it was not decided in {timeout:.3g} seconds", final=False)
    deadline = time.monotonic() + timeout
    starter = _supervise()
    starter.join(timeout)
    if starter.is_alive():
        return late
    running = _start_watch()
    if running is None:
        return Readiness(False, "nothing watches the hot paths of this process; its log says why", final=False)
    try:
        running.refresh(max(0.0, deadline - time.monotonic()))
    except TimedOut:
        return late
    found = standing(name)
    if found.native or not running.complaint:
        return found
    return Readiness(False, running.complaint, running.hint or found.hint, final=False)


def standing(name: str) -> Readiness:
    """Who answers a hot path of this process now; nothing is begun, and nobody waits."""
    if python_forced():
        return Readiness(False, "Python is forced", "unset SYNAPSE_FORCE_PYTHON")
    decision = PATHS[name].decision
    if decision.native is not None and decision.child is None and decision.below > 0:
        return Readiness(True, decision.why)
    # What has not been read, or is being tried in a process of its own, may be otherwise in a moment.
    return Readiness(False, decision.why, decision.hint, decision.child is None and decision is not UNDECIDED)


_starting = threading.Lock()
_starter: threading.Thread | None = None


def _supervise() -> threading.Thread:
    """Start the watch of this process once, in a thread: the first call does not wait for the imports of a database."""
    global _starter  # noqa: PLW0603 (one a process)
    with _starting:
        if _starter is None:
            _starter = threading.Thread(target=_start_watch, name="synapse-hotpath-start", daemon=True)
            _starter.start()
        return _starter


def _start_watch() -> Watch | None:
    from synapse.hotpath.rollout.watch import ensure_watched  # noqa: PLC0415 (see above)

    return ensure_watched()


def _after_fork() -> None:
    global _starting, _starter
    _starting, _starter = threading.Lock(), None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
