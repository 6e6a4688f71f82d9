"""A call of a command: who asks, from where, and how long they wait. What the process has open is the context's."""

from __future__ import annotations

import secrets
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Literal, Protocol

from synapse.errors import Forbidden

Permission = Literal["read", "manage"]
"""What a caller must hold to run a command: `read` changes nothing, `manage` may change anything."""

Surface = Literal["python", "terminal", "http"]
"""Where a call comes from: code in this process, a person at this machine, or the network."""

ON_THIS_MACHINE: frozenset[Surface] = frozenset({"python", "terminal"})
"""Surfaces whose callers may name files of this machine."""


class Progress(Protocol):
    """Told how far a long piece of work is; a surface shows it or ignores it."""

    def __call__(self, label: str, done: int, total: int | None) -> None: ...


def no_progress(label: str, done: int, total: int | None) -> None:
    """The listener of a surface that shows no progress."""


def new_trace() -> str:
    """A fresh W3C ``traceparent`` (https://www.w3.org/TR/trace-context/), not sampled."""
    return f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-00"


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a command.

    Attributes:
        surface: where it comes from.
        permissions: what the caller holds; more than a `Permission` may be among them.
        key: the name of the caller's API key, or None.
        trace: a W3C ``traceparent``; events that are published during the call carry it.
        timeout: seconds that the caller waits, or None.
        idempotency_key: a call with the same one, of the same caller and command, is carried out once.
        progress: told how far the work is.
    """

    surface: Surface = "python"
    permissions: frozenset[str] = frozenset({"manage"})
    key: str | None = None
    trace: str = field(default_factory=new_trace)
    timeout: float | None = None
    idempotency_key: str | None = None
    progress: Progress = no_progress


IN_PROCESS = Call()
"""The call of code in this process, which may do everything."""

_current: ContextVar[Call | None] = ContextVar("synapse_call", default=None)


class LacksPermission(Forbidden):
    """The caller does not hold the permission."""

    code = "insufficient_permissions"


def holds(permissions: Collection[str], needs: str) -> bool:
    """Whether these permissions cover this one. `manage` includes `read`, and no other one."""
    return needs in permissions or (needs == "read" and "manage" in permissions)


def require(permissions: Collection[str], needs: str, key: str | None) -> None:
    """Refuse a caller who lacks a permission.

    Raises:
        LacksPermission: says what is held and what is needed.
    """
    if not holds(permissions, needs):
        who = "the caller" if key is None else f"the API key {key!r}"
        raise LacksPermission(
            f"{who} holds {', '.join(sorted(permissions)) or 'no permissions'}; this needs {needs}",
            hint=f"`synapse key create NAME --permissions {needs}` makes one that may",
        )


def current_call() -> Call | None:
    """The call that is being carried out in this task, or None."""
    return _current.get()


@contextmanager
def carrying_out(call: Call) -> Iterator[None]:
    """Make a call the current one, for as long as it is carried out."""
    token = _current.set(call)
    try:
        yield
    finally:
        _current.reset(token)
