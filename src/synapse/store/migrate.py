"""Bringing the tables of a database up to date, once, whoever opens it first."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine

from synapse.store.database import POSTGRESQL, WRITES, translated
from synapse.store.migrations import REVISIONS, is_current

if TYPE_CHECKING:
    from alembic.config import Config

FOLDER = Path(__file__).parent / "migrations"
LOCK = 0x53594E41  # "SYNA": any number, the same in every process
LOOK_SECONDS = 0.01

_turn = threading.Lock()


async def migrate(engine: AsyncEngine) -> None:
    """Run the migrations that this database lacks, in one transaction; processes that open it at once take turns.

    Raises:
        DatabaseTooNew: its version is none that this Synapse knows.
        Unavailable, Overloaded, Corrupt: the database cannot be used.
    """
    with translated(engine.url):
        async with engine.connect() as connection:
            if is_current(await connection.run_sync(_version)):
                return
        async with _one_at_a_time(), engine.connect() as plain:
            if engine.dialect.name == POSTGRESQL:
                # Read committed: what is read after waiting for the lock must be what the one before has written.
                connection = await plain.execution_options(isolation_level="READ COMMITTED")
                async with connection.begin():
                    await connection.execute(sa.select(sa.func.pg_advisory_xact_lock(LOCK)))
                    await connection.run_sync(_upgrade)
            else:
                connection = await plain.execution_options(**{WRITES: True})  # takes SQLite's lock at once
                async with connection.begin():
                    await connection.run_sync(_upgrade)


@asynccontextmanager
async def _one_at_a_time() -> AsyncIterator[None]:
    """Migrations of two databases take turns within a process: what Alembic is at is global (`alembic.op`), and the
    other may be in another thread's event loop.
    """
    while not _turn.acquire(blocking=False):  # noqa: ASYNC110 (an event belongs to one loop)
        await asyncio.sleep(LOOK_SECONDS)
    try:
        yield
    finally:
        _turn.release()


def alembic_config() -> Config:
    """Alembic's configuration for our migrations."""
    from alembic.config import Config  # noqa: PLC0415 (as in `_upgrade`)

    config = Config()
    config.set_main_option("script_location", str(FOLDER).replace("%", "%%"))
    return config


def _version(connection: sa.Connection) -> str | None:
    """The migration the database is at; None before the first."""
    if not sa.inspect(connection).has_table("alembic_version"):
        return None
    return connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar()


def _upgrade(connection: sa.Connection) -> None:
    from alembic import command  # noqa: PLC0415 (a database that is up to date needs none of it)

    if not is_current(_version(connection)):
        config = alembic_config()
        config.attributes["connection"] = connection
        command.upgrade(config, REVISIONS[-1])
