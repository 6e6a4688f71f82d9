"""Publishing from anywhere: one call, from any thread, that never fails and costs nothing while nobody listens.

Who starts a process connects where messages go; `synapse.callosum.publish.recording` sends them to the log of the home.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from pydantic import BaseModel

from synapse.callosum.message import Message, Tract
from synapse.commands.call import current_call
from synapse.evidence import Evidence
from synapse.log import Logger

log = Logger("synapse.callosum", through_logging=True)

Outlet = Callable[[Message], None]
"""Takes a message in the thread that publishes it, and returns at once."""

_outlets: tuple[Outlet, ...] = ()
_lock = threading.Lock()


def connect(outlet: Outlet) -> Callable[[], None]:
    """Give an outlet every message that is published in this process from now on. Returns what ends that."""
    global _outlets  # noqa: PLW0603 - one list a process
    with _lock:
        _outlets = (*_outlets, outlet)

    def disconnect() -> None:
        global _outlets  # noqa: PLW0603
        with _lock:
            _outlets = tuple(kept for kept in _outlets if kept is not outlet)

    return disconnect


def publish(
    topic: str,
    payload: BaseModel,
    *,
    tract: Tract = Tract.INTERNAL,
    priority: int = 4,
    evidence: Evidence = Evidence.KNOWN,
) -> None:
    """Tell whoever listens that something happened. What goes wrong on the way is logged, never raised.

    What happens while a call of a command is carried out carries the trace of that call.
    """
    if not _outlets:
        return
    try:
        call = current_call()
        message = Message(topic, payload, tract, priority, evidence, trace=None if call is None else call.trace)
    except Exception:
        log.exception("events.not_published", topic=topic)
    else:
        forward(message)


def forward(message: Message) -> None:
    """As `publish`, with a message that another process has published."""
    try:
        for outlet in _outlets:
            outlet(message)
    except Exception:
        log.exception("events.not_published", topic=message.topic)
