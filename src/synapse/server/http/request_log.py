"""One log line per request, and the id by which a client and the log can speak of the same one.

Bodies, prompts, headers and query strings are never logged.
"""

from __future__ import annotations

import logging
import re
import sys
import time
import uuid
from typing import TextIO

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from synapse.callosum.message import Tract
from synapse.callosum.publish.publishing import publish
from synapse.evidence import Evidence
from synapse.server.events import RequestFinished

log: structlog.stdlib.BoundLogger = structlog.get_logger("synapse.server")

ID_FORM = re.compile(r"[A-Za-z0-9._-]{1,128}")
CLIENT_CLOSED = 499
"""What is logged when the client hung up before an answer began, as nginx does it."""
UNPUBLISHED = frozenset({"/health", "/ready", "/metrics"})
"""What is asked every few seconds by whoever watches the server, and is logged but no event."""
LONGEST_PATH = 200
MOST_KINDS = 1000


class RequestLog:
    """ASGI middleware: logs method, path, status, milliseconds and request id; answers with `X-Request-ID`.

    The same is published as `server.request.finished`, where the caller might ask at all: an event is written to the
    disk, and whoever holds no key fills nobody's.

    A client's own `X-Request-ID` is kept when it is short and plain, so that it cannot write lines into the log.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        asked = Headers(scope=scope).get("x-request-id", "")
        request_id = asked if ID_FORM.fullmatch(asked) else uuid.uuid4().hex
        started = time.perf_counter()
        status = CLIENT_CLOSED

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-ID"] = request_id
            await send(message)

        with structlog.contextvars.bound_contextvars(request_id=request_id):
            try:
                await self.app(scope, receive, send_with_id)
            finally:
                method, path, seconds = scope["method"], scope["path"], time.perf_counter() - started
                log.info("request", method=method, path=path, status=status, ms=round(seconds * 1000, 1))
                if "caller" in scope.get("state", {}) and path not in UNPUBLISHED:
                    path = path[:LONGEST_PATH]
                    request = RequestFinished(
                        method=method, path=path, status=status, seconds=seconds, request_id=request_id
                    )
                    publish("server.request.finished", request, tract=Tract.EXTERNAL, evidence=Evidence.REPORTED)


class Repeated(logging.Filter):
    """Lets through so many warnings and errors of one kind a minute, and counts the others.

    What goes wrong for each of a thousand connections would otherwise fill a disk. The line that follows the silence
    says how many were left out. Request lines are no warnings.
    """

    def __init__(self, most: int = 20, span_s: float = 60.0) -> None:
        super().__init__()
        self._most = most
        self._span_s = span_s
        self._kinds: dict[tuple[str, int, str], list[float]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is written."""
        if record.levelno < logging.WARNING:
            return True
        text = record.msg.get("event") if isinstance(record.msg, dict) else record.msg
        kind = (record.name, record.levelno, str(text)[:200])
        if len(self._kinds) > MOST_KINDS:
            self._kinds.clear()
        counted = self._kinds.setdefault(kind, [record.created, 0])
        left_out = counted[1] - self._most
        if record.created - counted[0] >= self._span_s:
            counted[:] = [record.created, 0]
            if left_out > 0:
                _add_to(record, left_out)
        counted[1] += 1
        return counted[1] <= self._most


def _add_to(record: logging.LogRecord, left_out: float) -> None:
    """Say in a record how many of its kind came before it."""
    if isinstance(record.msg, dict):
        record.msg["left_out"] = int(left_out)
    else:
        record.msg = f"{record.getMessage()} ({left_out:.0f} more of these were left out)"
        record.args = ()


def configure_logging(stream: TextIO = sys.stderr) -> None:
    """Log to `stream`: readable lines on a terminal, one JSON object a line everywhere else.

    This is for the process as a whole, so whoever starts the process calls it, once.
    """
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    renderer: structlog.typing.Processor
    if stream.isatty():
        renderer = structlog.dev.ConsoleRenderer()
    else:
        renderer = structlog.processors.JSONRenderer()
        shared.append(structlog.processors.format_exc_info)
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
    )
    handler = logging.StreamHandler(stream)
    handler.addFilter(Repeated())
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("synapse").setLevel(logging.INFO)
