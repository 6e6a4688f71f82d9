"""What of a log is written."""

from __future__ import annotations

import io
import json
import logging

import structlog

from synapse.server.http.request_log import Repeated, configure_logging


def record(text: object, created: float, level: int = logging.WARNING) -> logging.LogRecord:
    made = logging.LogRecord("synapse.server", level, "", 0, text, (), None)
    made.created = created
    return made


def test_what_is_said_a_thousand_times_is_written_a_few_times_and_counted() -> None:
    repeated = Repeated(most=3, span_s=60)
    assert [repeated.filter(record("no room", 0.0)) for _ in range(1000)].count(True) == 3
    assert repeated.filter(record("something else", 1.0))
    assert all(repeated.filter(record("a request", 1.0, logging.INFO)) for _ in range(100))
    later = record("no room", 61.0)
    assert repeated.filter(later)
    assert later.getMessage() == "no room (997 more of these were left out)"
    event = {"event": "a request failed", "path": "/a"}
    assert [repeated.filter(record(event | {"path": f"/{i}"}, 0.0)) for i in range(10)].count(True) == 3


def test_the_log_of_the_server_is_so_bounded() -> None:
    stream = io.StringIO()
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    try:
        configure_logging(stream)
        for i in range(500):
            structlog.get_logger("synapse.server").warning("it went wrong", number=i)
            logging.getLogger("asyncio").error("socket.accept() out of system resource", exc_info=OSError(24, "files"))
    finally:
        root.handlers, root.level = handlers, level
        structlog.reset_defaults()
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert len(lines) == 40
