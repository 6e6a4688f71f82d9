"""Opening the log of the settings, as a resource of a context."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from synapse.callosum.log.contract import Log
from synapse.commands import Context
from synapse.config import Settings

LOG_FILE = "events.db"


async def connect_log(settings: Settings) -> Log:
    """The log that the setting `events` names. Close it when done.

    Raises:
        Unavailable: it cannot be opened or reached, or the package for it is missing.
        InvalidInput: its URL is none.
    """
    if settings.events == "memory":
        from synapse.callosum.log.memory import MemoryLog  # noqa: PLC0415 - each process imports only its own backend

        return MemoryLog()
    if settings.events == "embedded":
        from synapse.callosum.log.sqlite.log import SqliteLog  # noqa: PLC0415 - likewise

        return await SqliteLog.open(settings.folder("") / LOG_FILE)
    from synapse.callosum.log.valkey.log import ValkeyLog  # noqa: PLC0415 - likewise

    return await ValkeyLog.connect(settings.events)


@asynccontextmanager
async def open_log(context: Context) -> AsyncIterator[Log]:
    """Opener of the log, for `Context.get`. Raises as `connect_log`."""
    log = await connect_log(context.settings)
    try:
        yield log
    finally:
        await log.close()
