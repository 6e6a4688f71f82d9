"""What only the embedded log promises: its file, a full disk, and many who share a wait for the disk."""

from __future__ import annotations

import asyncio
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path

import pytest

from callosum.log.log_backends import note, said
from synapse.callosum.log.sqlite.log import SqliteLog
from synapse.callosum.log.unreadable import TOPIC
from synapse.callosum.message import Tract
from synapse.errors import Conflict, Corrupt, InvalidInput, Unavailable
from synapse.store.errors import DatabaseTooNew


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "events.db"


@pytest.fixture
async def log(file: Path) -> AsyncIterator[SqliteLog]:
    opened = await SqliteLog.open(file)
    yield opened
    await opened.close()


# --- sharing a wait for the disk


@asynccontextmanager
async def locked(file: Path) -> AsyncIterator[None]:
    """While another program writes to the file, whoever wants to write waits."""
    with closing(sqlite3.connect(file, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield
        await asyncio.sleep(0.01)
        other.execute("ROLLBACK")


async def test_appends_at_the_same_time_share_a_commit(log: SqliteLog, file: Path) -> None:
    before = log.commits
    async with locked(file):
        appending = asyncio.gather(*(log.append([note(str(n))]) for n in range(2000)))
    assert all(one for (one,) in await appending)
    assert log.commits - before == 1
    assert said(await log.read(None, 2000)) == [str(n) for n in range(2000)], "in the order of the calls"


async def test_everything_else_shares_one_as_well(log: SqliteLog, file: Path) -> None:
    for n in range(100):
        await log.join(f"g{n}", "**", lease_s=60)
    await log.append([note("1")])
    before = log.commits
    async with locked(file):
        claiming = asyncio.gather(*(log.claim(f"g{n}", "a", 10, Tract.INTERNAL) for n in range(100)))
    claims = await claiming
    async with locked(file):
        acknowledging = asyncio.gather(*(log.acknowledge(f"g{n}", claims[n]) for n in range(100)))
    await acknowledging
    assert [said(found) for found in claims] == [["1"]] * 100
    assert log.commits - before == 2


async def test_looking_writes_nothing(log: SqliteLog) -> None:
    await log.join("g", "**")
    before = log.commits
    await log.claim("g", "a", 10, Tract.EXTERNAL)
    await log.read(None, 10)
    await log.dead()
    await log.stats()
    await log.changed(0.1)
    assert log.commits == before


async def test_one_who_asks_for_what_is_not_there_spoils_nothing_for_those_in_the_same_commit(log: SqliteLog) -> None:
    await log.join("g", "**")
    await log.append([note("1")])
    found = await asyncio.gather(
        log.append([note("2")]),
        log.claim("nobody", "a", 10, Tract.INTERNAL),
        log.claim("g", "a", 10, Tract.INTERNAL),
        log.replay(["5"]),
        return_exceptions=True,
    )
    assert [type(one).__name__ for one in found] == ["list", "NotFound", "list", "NotFound"]
    assert said(await log.read(None, 10)) == ["1", "2"]


async def test_what_one_claim_takes_is_bounded_in_bytes_too(log: SqliteLog) -> None:
    for start in range(0, 40, 10):
        await log.append([note(f"{n} " + "x" * 500_000) for n in range(start, start + 10)])
    await log.join("g", "**", start="first")
    first = await log.claim("g", "a", 1000, Tract.INTERNAL)
    rest = await log.claim("g", "a", 1000, Tract.INTERNAL)
    assert 10 < len(first) < 40
    assert [int(text.split()[0]) for text in said([*first, *rest])] == list(range(40))


# --- the file


async def test_the_file_is_private_to_its_user(log: SqliteLog, file: Path) -> None:
    await log.append([note("1")])
    assert {path.stat().st_mode & 0o777 for path in file.parent.glob("events.db*")} == {0o600}


def test_a_file_of_something_else_is_refused_and_left_alone(file: Path) -> None:
    file.write_bytes(b"a letter to somebody" * 500)
    with pytest.raises(Corrupt, match="no log"):
        asyncio.run(SqliteLog.open(file))
    assert file.read_bytes() == b"a letter to somebody" * 500


async def test_the_database_of_something_else_is_refused(file: Path) -> None:
    with closing(sqlite3.connect(file, isolation_level=None)) as db:
        db.execute("CREATE TABLE mine (x)")
    with pytest.raises(Conflict, match="something else"):
        await SqliteLog.open(file)


async def test_the_file_of_a_newer_version_is_refused(log: SqliteLog, file: Path) -> None:
    with closing(sqlite3.connect(file, isolation_level=None)) as db:
        db.execute("PRAGMA user_version = 99")
    with pytest.raises(DatabaseTooNew, match="99"):
        await SqliteLog.open(file)


async def test_a_file_of_the_first_version_is_brought_up_to_date(log: SqliteLog, file: Path) -> None:
    await log.join("g", "**")
    await log.append([note("1"), note("2")])
    (first,) = await log.claim("g", "a", 1, Tract.INTERNAL)
    await log.release("g", [first])
    await log.close()
    with closing(sqlite3.connect(file, isolation_level=None)) as db:
        for table, column in (
            ("log", "dead_dropped"),
            ("groups", "read_at"),
            ("groups", "unread"),
            ("pending", "failures"),
        ):
            db.execute(f"ALTER TABLE {table} DROP COLUMN {column}")
        db.execute("PRAGMA user_version = 1")
    again = await SqliteLog.open(file)
    found = await again.claim("g", "a", 9, Tract.INTERNAL)
    assert said(found) == ["1", "2"]
    await again.retry("g", found[0], 0)
    assert [one.attempt for one in await again.claim("g", "a", 9, Tract.INTERNAL)] == [2]
    assert (await again.stats()).groups[0].read_at > 0
    await again.close()


async def test_a_log_that_is_idle_reads_one_number_ten_times_a_second_and_hears_of_another_soon(file: Path) -> None:
    mine, other = await SqliteLog.open(file), await SqliteLog.open(file)
    looks: list[str] = []
    await mine._commits.read(lambda one: one.db.set_trace_callback(looks.append))
    await mine.changed(0.01)
    del looks[:]
    began = time.monotonic()
    await mine.changed(1.0)
    idle_s = time.monotonic() - began
    assert looks.count("BEGIN ") <= 3, "its own question when something is due, and nothing else"
    assert sum("data_version" in look for look in looks) <= 10 * idle_s + 3
    waiting = asyncio.create_task(mine.changed(60))
    await asyncio.sleep(0.3)
    await other.append([note("1")])
    async with asyncio.timeout(20):
        await waiting
    await mine.close()
    await other.close()


async def test_every_commit_waits_until_the_disk_has_it(log: SqliteLog) -> None:
    full = 2  # https://sqlite.org/pragma.html#pragma_synchronous
    assert await log._commits.read(lambda one: one.db.execute("PRAGMA synchronous").fetchone()) == (full,)
    assert await log._commits.read(lambda one: one.db.execute("PRAGMA journal_mode").fetchone()) == ("wal",)


async def test_a_folder_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="No such file"):
        await SqliteLog.open(tmp_path / "nowhere" / "events.db")


async def test_a_log_keeps_no_negative_number_of_messages(file: Path) -> None:
    with pytest.raises(InvalidInput, match="-1"):
        await SqliteLog.open(file, keep=-1)


async def test_many_who_open_a_new_file_at_once_all_get_it(file: Path) -> None:
    logs = await asyncio.gather(*(SqliteLog.open(file) for _ in range(10)))
    await asyncio.gather(*(log.append([note(str(n))]) for n, log in enumerate(logs)))
    assert len(await logs[0].read(None, 100)) == 10
    for log in logs:
        await log.close()


async def test_opening_the_file_again_leaves_the_locks_of_the_first_in_place(log: SqliteLog, file: Path) -> None:
    """Were they lost, another process would take itself for the last one and remove what is being written."""
    second = await SqliteLog.open(file)
    program = "import sqlite3, sys; sqlite3.connect(sys.argv[1], timeout=0).execute('PRAGMA journal_mode = DELETE')"
    other = await asyncio.create_subprocess_exec(sys.executable, "-c", program, file, stderr=subprocess.PIPE)
    _, said_by_other = await other.communicate()
    assert b"database is locked" in said_by_other
    await second.close()


async def test_a_file_locked_for_long_is_said_and_nothing_is_written(
    log: SqliteLog, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("synapse.callosum.log.sqlite.file.BUSY_S", 0.2)
    async with locked(file):
        with pytest.raises(Unavailable, match="locked"):
            await log.append([note("1")])
        assert await log.read(None, 10) == [], "reading goes on"
    assert await log.append([note("2")]) == [True]
    assert said(await log.read(None, 10)) == ["2"]


# --- what this version cannot read


async def test_a_message_that_cannot_be_read_is_buried_and_those_behind_it_are_delivered(
    log: SqliteLog, file: Path
) -> None:
    await log.join("g", "**", lease_s=60)
    await log.append([note("1"), note("2"), note("3")])
    with closing(sqlite3.connect(file, isolation_level=None)) as db:
        body = db.execute("SELECT body FROM messages WHERE number = 2").fetchone()[0]
        db.execute("UPDATE messages SET body = ? WHERE number = 2", (body.replace('"tract":1', '"tract":7'),))
    assert said(await log.claim("g", "a", 10, Tract.INTERNAL)) == ["1", "3"]
    (letter,) = await log.dead()
    assert (letter.reason, letter.message.topic) == ("unreadable", TOPIC)
    assert '"tract":7' in str(letter.message.payload)
    assert [entry.message.topic for entry in await log.read(None, 10)] == ["test.noted", TOPIC, "test.noted"]
    with closing(sqlite3.connect(file, isolation_level=None)) as db:
        db.execute("UPDATE dead SET body = ?", (body,))  # as a version that can read it sees it
    assert await log.replay() == 1
    assert said(await log.claim("g", "a", 10, Tract.INTERNAL)) == ["2"]


# --- a full disk


def run_full_disk(kind: str, folder: Path, *before: str) -> str:
    folder.mkdir()
    done = subprocess.run(
        [*before, sys.executable, "-m", "callosum.log.full_disk_program", kind, folder],
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_file_that_cannot_grow_loses_nothing_and_goes_on_when_it_can(tmp_path: Path) -> None:
    assert "full after" in run_full_disk("limit", tmp_path / "disk")


def test_a_full_disk_loses_nothing_and_goes_on_when_there_is_room(tmp_path: Path) -> None:
    own_mounts = ["unshare", "--user", "--map-root-user", "--mount"]
    probe = [*own_mounts, "mount", "-t", "tmpfs", "tmpfs", str(tmp_path)]
    if shutil.which("unshare") is None or subprocess.run(probe, check=False, capture_output=True).returncode:
        pytest.skip("this system lets no user mount a disk in a namespace of its own")
    assert "full after" in run_full_disk("tmpfs", tmp_path / "disk", *own_mounts)
