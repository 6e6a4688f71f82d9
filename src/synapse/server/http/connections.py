"""Connections: how long a request may take to begin, and how many there are at once.

A connection that has no whole request yet costs nobody anything but a file descriptor, and those end: so its headers
have a deadline, and when there are as many connections as the limit on open files allows, whichever has waited longest
without a request gives way to the new one. So `/health` answers beside any number of half-sent requests. A client
that reads nothing of what is sent to it is let go as well; who generates for it learns that it has gone.
"""

from __future__ import annotations

import asyncio
import json
import resource

import structlog
from uvicorn.protocols.http.h11_impl import H11Protocol

from synapse.errors import Overloaded, SynapseError
from synapse.server.http.errors import RETRY_AFTER, SlowBody, kind_of, openai_body

log: structlog.stdlib.BoundLogger = structlog.get_logger("synapse.server")

HEADER_SECONDS = 10.0
"""In which the first line and the headers of a request must have arrived."""
UNREAD_SECONDS = 60.0
"""In which a client must read what waits for it, once that is more than the transport holds (64 KiB)."""
MOST_CONNECTIONS = 4096
BACKLOG = 128
"""Connections that may be accepted at once, before any of them is looked at."""
OTHER_FILES = 64
"""Descriptors kept free for the store, the log, model files and layers."""


def most_connections() -> int:
    """As many connections as the limit on open files leaves room for."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return MOST_CONNECTIONS
    return max(8, min(MOST_CONNECTIONS, limit - BACKLOG - OTHER_FILES))


def guarded_protocol(
    most: int, *, header_seconds: float = HEADER_SECONDS, unread_seconds: float = UNREAD_SECONDS
) -> type[H11Protocol]:
    """uvicorn's HTTP protocol with these limits, for the connections of one server."""
    waiting: dict[Guarded, None] = {}  # without a request in progress, the one that has waited longest first

    class Guarded(H11Protocol):
        _deadline: asyncio.TimerHandle | None = None
        _unread: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            if len(self.connections) > most:
                if not waiting:
                    self._refuse(Overloaded(f"{most} connections are open, which is the limit", hint="try again later"))
                    return
                next(iter(waiting))._leave()
            self._note()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._note(begun=True)

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._note()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            self._stop_waiting()
            self._is_read()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._unread = self.loop.call_later(unread_seconds, self._give_up)

        def resume_writing(self) -> None:
            super().resume_writing()
            self._is_read()

        def _give_up(self) -> None:
            log.warning("a client did not read its answer and was let go", seconds=unread_seconds)
            self.transport.abort()

        def _is_read(self) -> None:
            if self._unread is not None:
                self._unread.cancel()
                self._unread = None

        def _note(self, *, begun: bool = False) -> None:
            """A request is in progress, or else is waited for: the first one, or one that has begun, not for long."""
            if self.transport.is_closing() or (self.cycle is not None and not self.cycle.response_complete):
                self._stop_waiting()
                return
            waiting.setdefault(self)
            if self._deadline is None and (begun or self.cycle is None):
                self._deadline = self.loop.call_later(header_seconds, self._too_slow)

        def _stop_waiting(self) -> None:
            waiting.pop(self, None)
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None

        def _too_slow(self) -> None:
            self._refuse(SlowBody(f"the headers of a request were not complete after {header_seconds:g} seconds"))

        def _leave(self) -> None:
            self._stop_waiting()
            self.transport.close()

        def _refuse(self, error: SynapseError) -> None:
            self.transport.write(raw_response(error))
            self._leave()

    return Guarded


def raw_response(error: SynapseError) -> bytes:
    """An error before there is a request that it could answer."""
    body = json.dumps(openai_body(error)).encode()
    status = 503 if isinstance(error, Overloaded) else kind_of(error).status
    retry = f"Retry-After: {RETRY_AFTER[status]}\r\n" if status in RETRY_AFTER else ""
    head = (
        f"HTTP/1.1 {status} {kind_of(error).title}\r\nContent-Type: application/json\r\n{retry}"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body
