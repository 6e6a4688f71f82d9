"""Group commit: one thread gathers what is waiting and commits it once, so that many share one wait for the disk."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from synapse.callosum.log.sqlite.file import connect, patiently, translated
from synapse.errors import SynapseError, Unavailable

MOST_CALLS = 4096
MOST_CHARACTERS = 16 << 20
"""What one transaction gathers, at most."""
POLL_S, IDLE_POLL_S, ACTIVE_S = 0.02, 0.1, 2.0
"""How often a log that somebody waits for looks whether another process has written to it: while something new came
within the last seconds, and else. A look reads one number of the shared memory; only what it says is then read."""

Row = tuple[int, str, str, str]
"""Tract, topic, key and body of a message."""
T = TypeVar("T")


@dataclass(slots=True)
class Head:
    """The row of the table `log`."""

    accepted: int
    duplicates: int
    trimmed: int
    claims: int
    news: int
    dead_dropped: int


_COLUMNS = ", ".join(field.name for field in fields(Head))


class Transaction:
    """What a call works on. `head` is written back when all calls of a transaction are done."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self.db = db
        self.head = Head(*db.execute(f"SELECT {_COLUMNS} FROM log").fetchone())  # noqa: S608 (ours)
        self.unread: list[str] = []
        """Groups that the log has stopped waiting for."""
        self._found = astuple(self.head)

    def finish(self) -> None:
        """Write the head if it has changed."""
        if (now := astuple(self.head)) != self._found:
            self.db.execute(f"UPDATE log SET ({_COLUMNS}) = (?, ?, ?, ?, ?, ?)", now)  # noqa: S608 (ours)


@dataclass(slots=True, eq=False)
class Call:
    """Statements, and who waits for their result. They raise a SynapseError only before they have written anything."""

    future: asyncio.Future[Any]
    run: Callable[[Transaction], Any] | None
    """None: accept `rows`; those of all calls are written by one statement."""
    rows: Sequence[Row] = ()
    undo: Callable[[Any, Transaction], None] | None = None
    """For a result whose caller was cancelled."""


Results = list[tuple[Call, Any]]
"""What became of calls: a result, or an exception."""


class Commits:
    """The connection to a log's file, in a thread of its own. For one event loop.

    Args:
        path: the file.
        append: accepts rows; for each, whether it was accepted.
        on_news: called in the loop when there may be something new.
        on_unread: called in the loop with a group that the log has stopped waiting for.
    """

    def __init__(
        self,
        path: Path,
        append: Callable[[Transaction, Sequence[Row]], list[bool]],
        on_news: Callable[[], None],
        on_unread: Callable[[str], None],
    ) -> None:
        self.commits = 0
        """How many transactions that write have been committed."""
        self.waiting = 0
        """How many wait for news: while somebody does, the thread looks for what other processes have written."""
        self._path = path
        self._append = append
        self._on_news = on_news
        self._on_unread = on_unread
        self._loop = asyncio.get_running_loop()
        self._queue: queue.SimpleQueue[tuple[Call, bool] | None] = queue.SimpleQueue()
        self._opened: asyncio.Future[None] = self._loop.create_future()
        self._ended: asyncio.Future[None] = self._loop.create_future()
        self._open = True
        # Of the thread:
        self._reads: list[Call] = []
        self._writes: list[Call] = []
        self._ending = False
        self._news = 0
        self._news_at = 0.0
        self._version = -1
        """What SQLite calls the state of the file; another connection's commit changes it."""

    async def open(self) -> None:
        """Start the thread. Raises as `synapse.callosum.log.sqlite.file.connect`."""
        threading.Thread(target=self._work, name=f"log {self._path.name}", daemon=True).start()
        try:
            await asyncio.shield(self._opened)
        except BaseException:  # also where the caller is cancelled: nobody else would end the thread
            self._open = False
            self._queue.put(None)
            raise

    async def read(self, run: Callable[[Transaction], T]) -> T:
        """The result of statements that change nothing."""
        found: T = await self._submit(Call(self._loop.create_future(), run), writes=False)
        return found

    async def write(self, run: Callable[[Transaction], T], undo: Callable[[T, Transaction], None] | None = None) -> T:
        """The result of statements, once it is durable. `undo` gets the result if the caller is cancelled meanwhile."""
        found: T = await self._submit(Call(self._loop.create_future(), run, undo=undo), writes=True)
        return found

    async def append(self, rows: Sequence[Row]) -> list[bool]:
        """Accept rows; returns when they are durable."""
        accepted: list[bool] = await self._submit(Call(self._loop.create_future(), None, rows), writes=True)
        return accepted

    async def close(self) -> None:
        """Finish what is waiting and close the connection."""
        if self._open:
            self._open = False
            self._queue.put(None)
        await asyncio.shield(self._ended)

    def _submit(self, call: Call, *, writes: bool) -> asyncio.Future[Any]:
        if not self._open:
            raise Unavailable("the log is closed")
        self._queue.put((call, writes))
        return call.future

    def _resolve(self, results: Results, news: bool) -> None:
        if news:
            self._on_news()
        for call, result in results:
            if call.future.done():  # cancelled
                if call.undo and self._open and not isinstance(result, BaseException):
                    self._queue.put((Call(self._loop.create_future(), partial(call.undo, result)), True))
            elif isinstance(result, BaseException):
                call.future.set_exception(result)
            else:
                call.future.set_result(result)

    # --- the thread

    def _work(self) -> None:
        try:
            db = connect(self._path)
        except Exception as error:
            self._tell(self._opened.set_exception, error)
            return
        self._tell(self._opened.set_result, None)
        try:
            while self._reads or self._writes or not (self._ending or self._loop.is_closed()):
                self._gather(wait=True)
                self._do_reads(db)
                self._do_writes(db)
        finally:
            try:
                db.close()
            finally:  # whoever closes the log waits for this
                self._tell(self._ended.set_result, None)

    def _gather(self, *, wait: bool) -> None:
        """Take what is in the queue, up to a limit; where nothing is there, wait for it."""
        wait = wait and not (self._reads or self._writes)
        size = sum(len(row[3]) for call in self._writes for row in call.rows)
        while not self._ending and len(self._writes) + len(self._reads) < MOST_CALLS and size < MOST_CHARACTERS:
            try:
                found = self._queue.get(wait, self._pause())
            except queue.Empty:
                break
            wait = False
            if found is None:
                self._ending = True
                break
            call, writes = found
            (self._writes if writes else self._reads).append(call)
            size += sum(len(row[3]) for row in call.rows)

    def _pause(self) -> float | None:
        """How long to wait for a call before the next look for news, None where nobody wants any."""
        if not self.waiting:
            return None
        return POLL_S if time.monotonic() - self._news_at < ACTIVE_S else IDLE_POLL_S

    def _changed(self, db: sqlite3.Connection) -> bool:
        """Whether another connection has written to the file since this was last asked."""
        before = self._version
        try:
            (self._version,) = db.execute("PRAGMA data_version").fetchone()
        except sqlite3.Error:  # what is wrong is found by the look
            return True
        return self._version != before

    def _do_reads(self, db: sqlite3.Connection) -> None:
        """What has been gathered that changes nothing, and a look for news."""
        if self._reads or (self.waiting and self._changed(db)):
            calls, self._reads = self._reads, []
            self._finish(calls, lambda: self._attempt(db, "BEGIN", calls))

    def _do_writes(self, db: sqlite3.Connection) -> None:
        if self._writes:
            self._finish(self._writes, lambda: self._attempt(db, "BEGIN IMMEDIATE", self._writes))
            self._writes = []

    def _finish(self, calls: list[Call], attempt: Callable[[], Results]) -> None:
        """Give the calls their results, or all of them the error."""
        before = self._news
        try:
            results = patiently(attempt)
        except sqlite3.Error as error:
            results = [(call, translated(error, self._path)) for call in calls]
        except Exception as error:  # a defect: those who wait raise it
            results = [(call, error) for call in calls]
        if self._news != before:
            self._news_at = time.monotonic()
        if results or self._news != before:
            self._tell(self._resolve, results, self._news != before)

    def _attempt(self, db: sqlite3.Connection, begin: str, calls: list[Call]) -> Results:
        """Run the calls in one transaction."""
        before = db.total_changes
        try:
            db.execute(begin)
            if calls is self._writes:
                self._gather(wait=False)  # what came while another process had the file
            transaction = Transaction(db)
            results = self._run(transaction, [call for call in calls if not call.future.cancelled()])
            transaction.finish()
            db.execute("COMMIT")
            self.commits += db.total_changes > before
            self._news = transaction.head.news
            for group in transaction.unread:
                self._tell(self._on_unread, group)
            return results
        finally:
            if db.in_transaction:
                db.execute("ROLLBACK")

    def _run(self, transaction: Transaction, calls: list[Call]) -> Results:
        results: Results = []
        appends = [call for call in calls if call.run is None]
        if appends:
            accepted = iter(self._append(transaction, [row for call in appends for row in call.rows]))
            results += [(call, [next(accepted) for _ in call.rows]) for call in appends]
        for call in calls:
            if call.run is not None:
                try:
                    results.append((call, call.run(transaction)))
                except SynapseError as error:
                    results.append((call, error))
        return results

    def _tell(self, function: Callable[..., object], *args: object) -> None:
        """Call it in the loop."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(function, *args)
