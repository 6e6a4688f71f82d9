"""The file of the embedded log: its tables, how it is opened, and what its errors mean."""

from __future__ import annotations

import os
import random
import sqlite3
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from synapse.errors import Conflict, Corrupt, SynapseError, Unavailable
from synapse.store.disk import cannot_write, is_full
from synapse.store.errors import DatabaseTooNew

APPLICATION = 0x53594E45
"""``SYNE`` in the file's header: the events of Synapse."""
VERSION = 2
PRIVATE_FILE = 0o600
BUSY_S = 10.0
MOST_WAL_BYTES = 64 << 20

TABLES = (
    # One row. `accepted` is also the number of the newest message, `trimmed` that of the last one forgotten; `news`
    # changes when there is something new to read or claim, `claims` numbers the claims.
    """CREATE TABLE log (
        accepted INTEGER NOT NULL, duplicates INTEGER NOT NULL, trimmed INTEGER NOT NULL, claims INTEGER NOT NULL,
        news INTEGER NOT NULL, dead_dropped INTEGER NOT NULL DEFAULT 0
    ) STRICT""",
    "INSERT INTO log VALUES (0, 0, 0, 0, 0, 0)",
    """CREATE TABLE messages (
        number INTEGER PRIMARY KEY, tract INTEGER NOT NULL, topic TEXT NOT NULL, key TEXT NOT NULL UNIQUE,
        body TEXT NOT NULL
    ) STRICT""",
    "CREATE INDEX messages_of_tract ON messages (tract)",
    # `cursor0` and `cursor1`: the number of the last message of each tract that the group has looked at. `read_at`:
    # when it was last claimed from, to the hour. `unread`: the log no longer waits for it.
    """CREATE TABLE groups (
        id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL UNIQUE, pattern TEXT NOT NULL, lease_s REAL NOT NULL,
        cursor0 INTEGER NOT NULL, cursor1 INTEGER NOT NULL, handled INTEGER NOT NULL, redelivered INTEGER NOT NULL,
        read_at REAL NOT NULL DEFAULT 0, unread INTEGER NOT NULL DEFAULT 0
    ) STRICT""",
    # `attempt` counts deliveries, `failures` those that ended with a retry. `due`: when it may be delivered again, the
    # end of a lease or of the pause before a retry. `body` is there where the message may have been trimmed: it was a
    # dead letter.
    """CREATE TABLE pending (
        owner INTEGER NOT NULL, number INTEGER NOT NULL, tract INTEGER NOT NULL, attempt INTEGER NOT NULL,
        due REAL NOT NULL, claim INTEGER NOT NULL, body TEXT, failures INTEGER NOT NULL DEFAULT 0,
        PRIMARY KEY (owner, number)
    ) STRICT, WITHOUT ROWID""",
    "CREATE INDEX pending_by_due ON pending (owner, tract, due)",
    """CREATE TABLE dead (
        id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL, number INTEGER NOT NULL, tract INTEGER NOT NULL,
        reason TEXT NOT NULL, error TEXT NOT NULL, attempts INTEGER NOT NULL, at REAL NOT NULL, body TEXT NOT NULL
    ) STRICT""",
    f"PRAGMA application_id = {APPLICATION}",
    f"PRAGMA user_version = {VERSION}",
)

FROM_1 = (
    "ALTER TABLE log ADD COLUMN dead_dropped INTEGER NOT NULL DEFAULT 0",
    "ALTER TABLE groups ADD COLUMN read_at REAL NOT NULL DEFAULT 0",
    "ALTER TABLE groups ADD COLUMN unread INTEGER NOT NULL DEFAULT 0",
    "UPDATE groups SET read_at = strftime('%s', 'now') + 0.0",
    "ALTER TABLE pending ADD COLUMN failures INTEGER NOT NULL DEFAULT 0",
    f"PRAGMA user_version = {VERSION}",
)
"""What brings a file of version 1 up to date."""

T = TypeVar("T")


def connect(path: Path) -> sqlite3.Connection:
    """A connection to the log in this file, which is made, private to the user, where there is none.

    Transactions are durable against loss of power: each commit waits until the disk has its write-ahead log.

    Raises:
        Unavailable: the file cannot be made or opened.
        Corrupt: it is no SQLite database, or a damaged one.
        Conflict: it is the database of something else, or (DatabaseTooNew) of a newer version.
    """
    try:
        _create(path)
        db = sqlite3.connect(path, timeout=0, isolation_level=None)
    except (OSError, sqlite3.Error) as error:
        raise Unavailable(
            f"the log {path} cannot be opened: {getattr(error, 'strerror', None) or error}",
            hint="set SYNAPSE_HOME to a place you can write to",
        ) from error
    try:
        patiently(lambda: _prepare(db, path))
    except BaseException as error:
        db.close()
        if isinstance(error, sqlite3.Error):
            raise translated(error, path) from error
        raise
    return db


def _create(path: Path) -> None:
    """Make the file. One that is there is not even opened: closing it would let go of this process' locks on it."""
    with suppress(FileExistsError):
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, PRIVATE_FILE))


def _prepare(db: sqlite3.Connection, path: Path) -> None:
    (mode,) = db.execute("PRAGMA journal_mode = WAL").fetchone()
    if mode != "wal":
        raise Unavailable(f"the disk of {path} has no shared memory for files", hint="keep the log on a local disk")
    for setting in ("synchronous = FULL", "fullfsync = ON", f"journal_size_limit = {MOST_WAL_BYTES}"):
        db.execute(f"PRAGMA {setting}").fetchall()
    db.execute("BEGIN IMMEDIATE")
    try:
        (application,), (version,) = (
            db.execute(f"PRAGMA {name}").fetchone() for name in ("application_id", "user_version")
        )
        if not db.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]:
            for statement in TABLES:
                db.execute(statement)
        elif application != APPLICATION:
            raise Conflict(f"{path} is the database of something else", hint="move it away, or use another home")
        elif version > VERSION:
            raise DatabaseTooNew(
                f"the log {path} has version {version}, this Synapse knows {VERSION}", hint="use the newer Synapse"
            )
        elif version == 1:
            for statement in FROM_1:
                db.execute(statement)
        db.execute("COMMIT")
    finally:
        if db.in_transaction:
            db.execute("ROLLBACK")


def patiently(work: Callable[[], T]) -> T:
    """Do what may find the file locked by another connection, again until it is free, for 10 seconds at most.

    Raises:
        sqlite3.Error: as `work`.
    """
    until = time.monotonic() + BUSY_S
    while True:
        try:
            return work()
        except sqlite3.OperationalError as error:
            if not _is(error, sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED) or time.monotonic() > until:
                raise
            time.sleep(random.uniform(0.0003, 0.0015))  # noqa: S311 - so that nobody waits in step with another


def translated(error: sqlite3.Error, path: Path) -> SynapseError:
    """What an error of SQLite means for whoever uses the log."""
    if _is(error, sqlite3.SQLITE_FULL) or (_is(error, sqlite3.SQLITE_IOERR) and is_full(path)):
        return Unavailable(
            f"the disk of the log {path} is full; nothing of this was written", hint="make room and try again"
        )
    if _is(error, sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return Unavailable(f"the log {path} stays locked by another program", hint="try again")
    if _is(error, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT):
        return Corrupt(
            f"the log {path} is damaged or no log: {error}",
            hint="stop what uses it and move it away; a new one is made",
        )
    cause, hint = cannot_write(path) or (str(error), "check its disk and its permissions")
    return Unavailable(f"the log {path} cannot be read or written: {cause}", hint=hint)


def _is(error: sqlite3.Error, *codes: int) -> bool:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in codes
