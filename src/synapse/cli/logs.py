"""Where a command's log goes: to standard error, warnings and worse, so that standard output is only the answer."""

from __future__ import annotations

import logging
import sys

from synapse.log import set_up_with


def log_to_stderr() -> None:
    """Set up the log of a command. The server sets up its own."""
    set_up_with(_configure)


def _configure() -> None:
    import structlog

    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.dev.set_exc_info,
            structlog.processors.TimeStamper(fmt="%Y-%m-%d %H:%M:%S", utc=False),
            structlog.dev.ConsoleRenderer(colors=False),
        ],
        logger_factory=lambda *_: structlog.PrintLogger(sys.stderr),
        wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING),
    )
