"""A database by its URL, through SQLAlchemy: PostgreSQL, and for its migrations SQLite as well."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from synapse.errors import InvalidInput, Overloaded, Unavailable
from synapse.store.errors import Contention, Duplicate
from synapse.store.sqlite import create_private_file, pragmas, problem_of

SQLITE, POSTGRESQL = "sqlite", "postgresql"
DRIVERS = {SQLITE: "sqlite+aiosqlite", POSTGRESQL: "postgresql+psycopg", "postgres": "postgresql+psycopg"}
CONNECT_SECONDS = 10
WRITES = "synapse_writes"
"""Execution option of a connection whose transaction is going to write."""

# SQLSTATE, PostgreSQL manual, appendix A.
SERIALIZATION_FAILURE, DEADLOCK, UNIQUE_VIOLATION = "40001", "40P01", "23505"


def parse_url(text: str) -> sa.URL:
    """The URL of a database, with the driver that Synapse uses for it.

    Raises:
        InvalidInput: not a URL, another kind of database, or SQLite without a file.
    """
    try:
        url = sa.make_url(text)
    except ArgumentError as error:
        raise InvalidInput(
            "the database URL cannot be read",
            hint="SYNAPSE_DATABASE_URL is like sqlite:////path/to/synapse.db or postgresql://user@host/database",
        ) from error
    kind = url.drivername.partition("+")[0]
    if kind not in DRIVERS:
        raise InvalidInput(
            f"the database must be SQLite or PostgreSQL, not {kind!r}",
            hint="set SYNAPSE_DATABASE_URL to postgresql://…, or leave it empty for SQLite in the home folder",
        )
    if kind == SQLITE and url.database in (None, "", ":memory:"):
        raise InvalidInput("SQLite needs a file: one in memory is empty for every connection")
    return url.set(drivername=DRIVERS[kind])


def sqlite_url(path: Path) -> sa.URL:
    """The URL of a file, whatever characters its path has."""
    return sa.URL.create(DRIVERS[SQLITE], database=str(path))


def open_engine(url: sa.URL) -> AsyncEngine:
    """The engine of a database. Nothing is connected yet, except that SQLite's file is made, private to the user.

    Raises:
        Unavailable: the driver is not installed, or the file cannot be made.
    """
    if url.get_backend_name() == POSTGRESQL:
        try:
            return create_async_engine(
                url,
                isolation_level="SERIALIZABLE",
                pool_pre_ping=True,
                connect_args={"connect_timeout": CONNECT_SECONDS},
            )
        except ModuleNotFoundError as error:
            raise Unavailable(
                "PostgreSQL needs the package psycopg, which is not installed",
                hint="pip install 'synapse[postgres]'",
            ) from error
    create_private_file(Path(str(url.database)))
    engine = create_async_engine(url)
    event.listen(engine.sync_engine, "connect", _prepare_sqlite)
    event.listen(engine.sync_engine, "begin", _begin_sqlite)
    return engine


def _prepare_sqlite(connection: Any, record: object) -> None:
    connection.isolation_level = None  # the driver must not begin transactions by itself: `_begin_sqlite` does
    cursor = connection.cursor()
    for pragma in pragmas():
        cursor.execute(pragma)
    cursor.close()


def _begin_sqlite(connection: sa.Connection) -> None:
    """A transaction that writes takes the lock at once; one that upgrades later could fail instead of waiting."""
    writes = connection.get_execution_options().get(WRITES, False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


@contextmanager
def translated(url: sa.URL) -> Iterator[None]:
    """Turn what the database raises into errors of Synapse.

    Raises:
        Contention: another transaction was in the way; trying again can work.
        Duplicate: a value that must be unique exists.
        Overloaded: the database stayed locked, or all connections stayed busy.
        Corrupt: the file is not a database, or a damaged one.
        Unavailable: anything else, such as a server that does not answer.
    """
    place = url.render_as_string(hide_password=True)
    try:
        yield
    except PoolTimeout as error:
        raise Overloaded(f"all connections to the database {place} are busy", hint="try again in a moment") from error
    except DBAPIError as error:
        original: Any = error.orig
        state = getattr(original, "sqlstate", None)
        if isinstance(original, sqlite3.Error):
            raise problem_of(original, str(url.database)) from error
        if state in (SERIALIZATION_FAILURE, DEADLOCK):
            raise Contention("the database was changed by another at the same time", hint="try again") from error
        if state == UNIQUE_VIOLATION:
            raise Duplicate("a value that must be unique exists already") from error
        raise Unavailable(
            f"the database {place} does not do as asked: {str(original).strip()}",
            hint="check that it runs and that SYNAPSE_DATABASE_URL is right",
        ) from error
    except SQLAlchemyError as error:
        raise Unavailable(f"the database {place} cannot be used: {error}") from error
