"""SQLite, spoken to directly: most commands read a few rows, and importing SQLAlchemy takes longer than they do.

The file, its tables and its values are those that SQLAlchemy and Alembic make and read (`store/migrate.py`).
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import sqlite3
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiosqlite

from synapse.errors import Corrupt, Overloaded, SynapseError, Unavailable
from synapse.store.columns import Kind, columns_of
from synapse.store.disk import cannot_write, is_full
from synapse.store.entity import Entity, spec_of
from synapse.store.errors import Duplicate
from synapse.store.transaction import Query, Row, Transaction

PRIVATE_FILE = 0o600
BUSY_MILLISECONDS = 10_000
CONNECTIONS = 15
CONNECTION_SECONDS = 30.0
"""Longest wait for one of the connections."""


def pragmas() -> tuple[str, ...]:
    """What every connection begins with."""
    return (
        f"PRAGMA busy_timeout={BUSY_MILLISECONDS}",
        "PRAGMA journal_mode=WAL",
        "PRAGMA foreign_keys=ON",
        "PRAGMA synchronous=FULL",
    )


def create_private_file(path: Path) -> None:
    """Make the database's file, if there is none. SQLite gives its journal the permissions of the database.

    Raises:
        Unavailable: it cannot be made.
    """
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, PRIVATE_FILE))
    except FileExistsError:
        return
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(f"the disk is full: {path} cannot be created", hint="make room on that disk") from error
        raise NotWritable(
            f"the database {path} cannot be created: {error.strerror}",
            hint="set SYNAPSE_HOME or SYNAPSE_DATABASE_URL to a place you can write to",
        ) from error


class NotWritable(Unavailable):
    """The file may not be written, or not even be opened."""

    code = "not_writable"


class DiskFull(Unavailable):
    """There is no room left where the database is."""

    code = "disk_full"


def problem_of(error: sqlite3.Error, place: str) -> SynapseError:  # noqa: PLR0911 (one answer for each cause)
    """The error of Synapse for one of SQLite's. `place` says which database it is."""
    name = getattr(error, "sqlite_errorname", "") or ""
    if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
        return Overloaded(f"the database {place} is locked by another program", hint="try again")
    if name.endswith("UNIQUE") or name == "SQLITE_CONSTRAINT_PRIMARYKEY":
        return Duplicate("a value that must be unique exists already")
    if name.startswith(("SQLITE_NOTADB", "SQLITE_CORRUPT")):
        return Corrupt(f"the database {place} is damaged or not a database: {error}", hint="restore it from a backup")
    if name == "SQLITE_FULL" or (name.startswith("SQLITE_IOERR") and is_full(Path(place))):
        return DiskFull(f"the disk is full: {place} cannot grow", hint="make room on that disk; nothing was changed")
    if name.startswith(("SQLITE_READONLY", "SQLITE_CANTOPEN", "SQLITE_PERM")):
        cause, hint = cannot_write(Path(place)) or (str(error), "see whether the file and its folder are yours")
        return NotWritable(f"the database {place} cannot be opened for writing: {cause}", hint=hint)
    if name.startswith("SQLITE_IOERR"):
        return Unavailable(
            f"the disk of the database {place} does not do as asked: {error}",
            hint="see whether a limit of its size was reached (a quota, ulimit -f), or it is failing (dmesg)",
        )
    return Unavailable(f"the database {place} does not do as asked: {error}", hint="see whether the file is in order")


class SqliteDatabase:
    """One file. Its connections each have a thread, are made when they are needed and kept."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._idle: list[aiosqlite.Connection] = []
        self._places = asyncio.Semaphore(CONNECTIONS)
        # SQLite has one writer at a time: waiting here is fair, waiting for its lock is not.
        self._writer = asyncio.Lock()
        self._closed = False

    @asynccontextmanager
    async def begin(self, *, writes: bool) -> AsyncIterator[Transaction]:
        """A transaction. One that writes takes SQLite's lock at once; one that upgrades later could fail instead of
        waiting.
        """
        with self._translated():
            async with self._writer if writes else nullcontext(), self._connection() as connection:
                try:
                    await connection.execute("BEGIN IMMEDIATE" if writes else "BEGIN")
                    yield SqliteTransaction(connection)
                    await connection.commit()
                except BaseException:
                    await connection.rollback()
                    raise

    async def version(self) -> str | None:
        """Which migration the tables are at; None before the first."""
        with self._translated():
            async with self._connection() as connection:
                found = await connection.execute_fetchall(
                    "SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = 'alembic_version'"
                )
                if not found:
                    return None
                rows = list(await connection.execute_fetchall("SELECT version_num FROM alembic_version"))
                return str(rows[0][0]) if rows else None

    async def close(self) -> None:
        """Close every connection; those in use close when they are given back."""
        self._closed = True
        while self._idle:
            await self._idle.pop().close()

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[aiosqlite.Connection]:
        try:
            async with asyncio.timeout(CONNECTION_SECONDS):
                await self._places.acquire()
        except TimeoutError as error:
            raise Overloaded(
                f"all connections to the database {self._path} are busy", hint="try again in a moment"
            ) from error
        try:
            connection = self._idle.pop() if self._idle else await self._connect()
            try:
                yield connection
            finally:
                if self._closed:
                    await connection.close()
                else:
                    self._idle.append(connection)
        finally:
            self._places.release()

    async def _connect(self) -> aiosqlite.Connection:
        connection = aiosqlite.connect(self._path, isolation_level=None)
        connection._thread.daemon = True  # a process that ends without closing must not wait for it
        await connection
        try:
            for pragma in pragmas():
                await connection.execute(pragma)
        except BaseException:
            await connection.close()
            raise
        return connection

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise problem_of(error, str(self._path)) from error


class SqliteTransaction:
    """The five statements in SQLite's SQL."""

    def __init__(self, connection: aiosqlite.Connection) -> None:
        self._connection = connection

    async def select(self, kind: type[Entity], query: Query) -> Sequence[Row]:
        columns = columns_of(kind)
        where, values = _where(kind, query.where)
        direction = "DESC" if query.descending else "ASC"
        found = await self._connection.execute_fetchall(
            f"SELECT {_names(columns)} FROM {_table(kind)}{where}"
            f' ORDER BY "{query.order_by}" {direction}, "id" {direction} LIMIT ? OFFSET ?',
            [*values, -1 if query.limit is None else query.limit, query.offset],
        )
        return [
            {name: _read(column.kind, value) for (name, column), value in zip(columns.items(), row, strict=True)}
            for row in found
        ]

    async def count(self, kind: type[Entity], where: Mapping[str, Any]) -> int:
        condition, values = _where(kind, where)
        found = list(await self._connection.execute_fetchall(f"SELECT count(*) FROM {_table(kind)}{condition}", values))
        return int(found[0][0])

    async def insert(self, kind: type[Entity], row: Row) -> None:
        marks = ", ".join("?" * len(row))
        await self._connection.execute(
            f"INSERT INTO {_table(kind)} ({_names(row)}) VALUES ({marks})", _values(kind, row)
        )

    async def update(self, kind: type[Entity], id: str, row: Row) -> None:  # noqa: A002
        changes = ", ".join(f'"{name}" = ?' for name in row)
        await self._connection.execute(f'UPDATE {_table(kind)} SET {changes} WHERE "id" = ?', [*_values(kind, row), id])

    async def delete(self, kind: type[Entity], id: str) -> None:  # noqa: A002
        await self._connection.execute(f'DELETE FROM {_table(kind)} WHERE "id" = ?', [id])


# Names of tables and columns are those of registered classes, never of a stranger; values are always bound.


def _table(kind: type[Entity]) -> str:
    return f'"{spec_of(kind).table}"'


def _names(columns: Mapping[str, Any]) -> str:
    return ", ".join(f'"{name}"' for name in columns)


def _where(kind: type[Entity], where: Mapping[str, Any]) -> tuple[str, list[Any]]:
    if not where:
        return "", []
    columns = columns_of(kind)
    conditions = [f'"{columns[name].name}" IS ?' for name in where]  # IS: equals, for NULL too
    return f" WHERE {' AND '.join(conditions)}", _values(kind, where)


def _values(kind: type[Entity], row: Mapping[str, Any]) -> list[Any]:
    columns = columns_of(kind)
    return [_written(columns[name].kind, value) for name, value in row.items()]


def _written(kind: Kind, value: Any) -> Any:
    """A value as SQLAlchemy keeps it in SQLite: a time in UTC without its zone, a structure as JSON."""
    if value is None:
        return None
    if kind is Kind.STRUCTURE:
        return json.dumps(value)
    if kind is Kind.TIME:
        return value.astimezone(UTC).replace(tzinfo=None).isoformat(sep=" ", timespec="microseconds")
    return value


def _read(kind: Kind, value: Any) -> Any:
    """The opposite. What cannot be read stays as it is, for the entity to refuse."""
    try:
        if kind is Kind.STRUCTURE and value is not None:
            return json.loads(value)
        if kind is Kind.TIME and value is not None:
            return datetime.fromisoformat(value).replace(tzinfo=UTC)
    except (ValueError, TypeError):
        return value
    return bool(value) if kind is Kind.BOOLEAN and value in (0, 1) else value
