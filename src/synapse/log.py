"""Loggers that import structlog when something is first logged: most commands log nothing, and its import is slow."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Any

_setup: Callable[[], None] | None = None


def set_up_with(setup: Callable[[], None]) -> None:
    """How structlog is to be configured: at once if it is imported already, otherwise before the first line."""
    global _setup  # noqa: PLW0603 (structlog has one configuration a process)
    _setup = setup
    if "structlog" in sys.modules:
        _configured()


def _configured() -> Any:
    global _setup
    import structlog  # noqa: PLC0415 (what this module is for)

    setup, _setup = _setup, None
    if setup is not None:
        setup()
    return structlog


class Logger:
    """The logger of a module, with the methods of structlog's.

    Args:
        name: of the logger.
        through_logging: hand the lines to the standard library's `logging`. A program that has not set up any logging
            then finds warnings on its stderr, and nothing on its stdout.
    """

    def __init__(self, name: str, *, through_logging: bool = False) -> None:
        self._name = name
        self._through_logging = through_logging

    def debug(self, event: str, **facts: Any) -> None:
        self._bound().debug(event, **facts)

    def info(self, event: str, **facts: Any) -> None:
        self._bound().info(event, **facts)

    def warning(self, event: str, **facts: Any) -> None:
        self._bound().warning(event, **facts)

    def error(self, event: str, **facts: Any) -> None:
        self._bound().error(event, **facts)

    def exception(self, event: str, **facts: Any) -> None:
        self._bound().exception(event, **facts)

    def _bound(self) -> Any:
        structlog = _configured()
        if self._through_logging:
            return structlog.wrap_logger(logging.getLogger(self._name))
        return structlog.get_logger(self._name)
