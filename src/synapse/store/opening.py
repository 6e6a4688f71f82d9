"""Opening the store: connect, bring the tables up to date, and close it with the context."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from synapse.commands import Context
from synapse.errors import InvalidInput
from synapse.store.migrations import is_current
from synapse.store.sqlite import SqliteDatabase, create_private_file
from synapse.store.store import Store

SQLITE_URL = re.compile(r"sqlite(?:\+\w+)?:///(?P<path>.+)", re.DOTALL)


async def connect(url: str) -> Store:
    """The store of this database, with its tables brought up to date. Close it when done.

    Raises:
        InvalidInput: the URL is not one of SQLite or PostgreSQL.
        Unavailable: the database or its driver is missing, or its disk is full or may not be written.
        DatabaseTooNew: a newer version of Synapse has used it.
    """
    sqlite = SQLITE_URL.fullmatch(url)
    if sqlite is None:
        return await _connect_through_sqlalchemy(url)
    if sqlite["path"] == ":memory:":
        raise InvalidInput("SQLite needs a file: one in memory is empty for every connection")
    path = Path(sqlite["path"])
    create_private_file(path)
    database = SqliteDatabase(path)
    try:
        if not is_current(await database.version()):
            await _migrate_sqlite(path)
    except BaseException:
        await database.close()
        raise
    return Store(database)


# SQLAlchemy and Alembic take half a second to import: only where there is something for them to do.


async def _connect_through_sqlalchemy(url: str) -> Store:
    from synapse.store.database import open_engine, parse_url  # noqa: PLC0415
    from synapse.store.migrate import migrate  # noqa: PLC0415
    from synapse.store.postgresql import PostgresDatabase  # noqa: PLC0415

    engine = open_engine(parse_url(url))
    try:
        await migrate(engine)
    except BaseException:
        await engine.dispose()
        raise
    return Store(PostgresDatabase(engine))


async def _migrate_sqlite(path: Path) -> None:
    from synapse.store.database import open_engine, sqlite_url  # noqa: PLC0415
    from synapse.store.migrate import migrate  # noqa: PLC0415

    engine = open_engine(sqlite_url(path))
    try:
        await migrate(engine)
    finally:
        await engine.dispose()


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
