"""Opening the store: connect, bring the tables up to date, and close it with the context."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from synapse.commands import Context
from synapse.store.database import open_engine, parse_url
from synapse.store.migrate import migrate
from synapse.store.store import Store


async def connect(url: str) -> Store:
    """The store of this database, with its tables brought up to date. Close it when done.

    Raises:
        InvalidInput: the URL is not one of SQLite or PostgreSQL.
        Unavailable: the database or its driver is missing.
        DatabaseTooNew: a newer version of Synapse has used it.
    """
    engine = open_engine(parse_url(url))
    try:
        await migrate(engine)
    except BaseException:
        await engine.dispose()
        raise
    return Store(engine)


@asynccontextmanager
async def open_store(context: Context) -> AsyncIterator[Store]:
    """The store of the settings' database, as a resource of the context. Raises as `connect`."""
    if not context.settings.database_url:
        context.settings.folder("")  # SQLite makes its file in the home folder, not the folder itself
    store = await connect(context.settings.database)
    try:
        yield store
    finally:
        await store.close()
